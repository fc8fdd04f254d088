"""Candidates that no other one beats in both of two figures."""

from collections.abc import Sequence


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points that no other point beats, both figures being better when lower.

    A point is beaten by one that is as low in both and lower in one. Of equal points all stay.

    Returns:
        In the order of the first figure.
    """
    order = sorted(range(len(points)), key=lambda index: points[index])
    front: list[int] = []
    for index in order:
        last = points[front[-1]] if front else None
        if last is not None and points[index] != last and points[index][1] >= last[1]:
            continue
        front.append(index)
    return front
