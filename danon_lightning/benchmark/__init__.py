"""The ``danon-bench`` command: one folder a subject, with its job for the ranks, its report and its command line."""
