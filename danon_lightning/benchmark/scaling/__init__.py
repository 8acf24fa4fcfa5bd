"""``danon-bench scaling``: speed-up by number of hosts, measured, predicted and projected."""
