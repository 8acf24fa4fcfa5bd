"""``danon-bench recall``: what the attention mechanisms learn, at equal parameters, steps and time."""
