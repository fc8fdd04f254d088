"""Megatron's strings for custom pipeline layouts. Imports neither torch nor Megatron."""

import re

# As Megatron unrolls them (PipelineParallelLayerLayout): first (..)*n, then x*n.
_REPEATS = (r"\(([^)]+)\)\*(\d+)", r"(.)\*(\d+)")


def layers_per_chunk(layout: str) -> list[int]:
    """Decoder layers of every model chunk, in the order of the layers.

    Args:
        layout: ``Et*3|(t|)*2tL``: chunks between bars, ``E`` the embedding, ``t`` a decoder layer,
            ``L`` the output layer and loss; ``x*n`` and ``(..)*n`` repeat, commas mean nothing.

    Raises:
        ValueError: not such a string, a chunk without a layer, or E and L not at the ends.
    """
    text = layout.replace(",", "")
    for pattern in _REPEATS:
        text = re.sub(pattern, lambda match: match.group(1) * int(match.group(2)), text)
    chunks = text.split("|")
    if not re.fullmatch(r"E[t|]*L", text):
        raise ValueError(
            "pipeline_model_parallel_layout="
            f"{layout} must start with E, end with L and hold t and | between (multi-token "
            "prediction, m, is not supported)"
        )
    sizes = [chunk.count("t") for chunk in chunks]
    if 0 in sizes:
        raise ValueError(
            f"pipeline_model_parallel_layout={layout} leaves part {sizes.index(0) + 1} of "
            f"{len(sizes)} without a layer (t); give it one, or use fewer parts"
        )
    return sizes
