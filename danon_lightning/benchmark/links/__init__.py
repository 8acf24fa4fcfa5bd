"""The links of a cluster: latency and bandwidth by level, and whether exchanges take as long as is predicted."""
