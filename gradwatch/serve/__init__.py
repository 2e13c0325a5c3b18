"""The node agent: one /metrics for every recording in a directory."""
