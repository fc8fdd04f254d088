"""The records of a training run that two runs of the same mathematics share."""

SPEED = ("tokens_per_second", "tflops_per_gpu", "mfu", "peak_memory_gib")


def without_speed(history: list[dict[str, float]]) -> list[dict[str, float]]:
    """``history`` without what the machine decides, so that two runs compare as equal."""
    return [{k: v for k, v in record.items() if k not in SPEED} for record in history]
