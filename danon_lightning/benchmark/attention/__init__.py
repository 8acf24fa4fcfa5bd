"""``danon-bench attention``: time, memory and streaming state of the attention mechanisms, by sequence length."""
