"""Configs of the experiments: `get_config(arm)` with the arms `tiny`, `small` and `paper`."""
