"""What a pipeline will take, from sizes alone: no torch, no weights, no GPU."""
