"""Damage to files, as a failing disk does it."""

from pathlib import Path


def flip_bit(path: Path, where: float = 0.7) -> None:
    """Flip one bit, ``where`` of the way through a file, and leave its size as it is."""
    data = bytearray(path.read_bytes())
    data[int(len(data) * where)] ^= 1
    path.write_bytes(bytes(data))
