"""Runs a list of stages, skipping those whose results are up to date."""
