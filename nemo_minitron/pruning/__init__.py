"""Pruning: scores -> plan (kept indices) -> smaller weights."""
