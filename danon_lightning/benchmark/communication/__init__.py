"""``danon-bench communication``: what exchanging gradients costs, by algorithm and bandwidth."""
