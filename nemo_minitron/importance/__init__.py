"""Importance scores: activation statistics over a calibration set, the same on every layout."""
