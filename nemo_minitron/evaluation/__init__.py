"""Loss on held-out data, tasks of lm-eval, and speed of a model."""
