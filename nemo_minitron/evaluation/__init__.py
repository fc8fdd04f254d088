"""Held-out loss of a model."""
