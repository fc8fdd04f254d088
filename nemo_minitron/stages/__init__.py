"""One module per stage, each with ``check(cfg)`` (user input, cheap) and ``run(cfg)``."""
