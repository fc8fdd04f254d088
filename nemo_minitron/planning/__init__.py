"""Estimate memory, operations and time of a pipeline from sizes alone, without torch or a GPU."""
