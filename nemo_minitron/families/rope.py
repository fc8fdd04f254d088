"""Rotary positions as config.json gives them, read as transformers reads them.

Three generations of config.json are about: ``rope_theta`` and ``rope_scaling`` beside each other,
all of it in ``rope_parameters``, and both. What transformers makes of them is in its
``convert_rope_params_to_dict``: ``rope_scaling`` before ``rope_parameters``, what is inside before
what is beside. Where two places disagree programs differ, and so they are refused.
"""

from dataclasses import dataclass
from typing import Any

from nemo_minitron.families.config_json import words

# What Megatron-Core's RotaryEmbedding hard-codes of Llama 3's scaling; only the factor is free.
LLAMA3_SCALING = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
ROPE_KEYS = words(
    "rope_theta rope_scaling rope_parameters partial_rotary_factor original_max_position_embeddings"
)
"""Keys of config.json that ``read_rope`` reads."""
_ORIGINAL = "original_max_position_embeddings"
_KNOWN = {
    *("rope_type", "type", "rope_theta", "partial_rotary_factor", "factor"),
    *LLAMA3_SCALING,
}


@dataclass(frozen=True)
class Rope:
    """Rotary positions.

    Attributes:
        base: ``rope_theta``.
        share: part of the head dim that is rotated.
        scaling: Llama 3's ``rope_scaling`` dictionary, or None.
    """

    base: float
    share: float
    scaling: dict[str, Any] | None


def read_rope(hf: dict[str, Any], base: float = 10000.0, share: float = 1.0) -> Rope:
    """Rotary positions of a config.json.

    Args:
        hf: config.json.
        base: the family's default of ``rope_theta``.
        share: the family's default of ``partial_rotary_factor``.

    Raises:
        ValueError: two places disagree, or a kind of scaling is not supported.
    """
    for key in ("rope_scaling", "rope_parameters"):
        _check_dictionary(key, hf.get(key))
    _refuse_two_dictionaries(hf)
    given: dict[str, Any] = hf.get("rope_scaling") or hf.get("rope_parameters") or {}
    found = {
        "rope_theta": _one(hf, given, "rope_theta", base),
        "partial_rotary_factor": _one(hf, given, "partial_rotary_factor", share),
    }
    if float(found["rope_theta"]) % 1:
        raise ValueError(
            f"config.json rope_theta={found['rope_theta']} is not supported; only whole numbers"
        )
    rotated = found["partial_rotary_factor"]
    return Rope(
        base=float(found["rope_theta"]),
        share=1.0 if rotated is None else float(rotated),
        scaling=_scaling(hf, given),
    )


def _check_dictionary(key: str, value: Any) -> None:
    if value is not None and not isinstance(value, dict):
        raise ValueError(f"config.json {key}={value!r} is no dictionary and not null")
    nested = [name for name, inner in (value or {}).items() if isinstance(inner, dict)]
    if nested:
        raise ValueError(
            f"config.json {key} has a rotation for each of {nested}, not supported; only one for "
            "all layers"
        )


def _refuse_two_dictionaries(hf: dict[str, Any]) -> None:
    one, other = hf.get("rope_scaling"), hf.get("rope_parameters")
    if not (isinstance(one, dict) and isinstance(other, dict)):
        return
    for key in sorted({*one, *other}):
        if key in one and key in other and one[key] != other[key]:
            raise ValueError(
                f"config.json rope_scaling.{key}={one[key]} and rope_parameters.{key}={other[key]} "
                "disagree; leave one of them out in a copy of config.json"
            )


def _one(hf: dict[str, Any], given: dict[str, Any], key: str, default: float) -> Any:
    """A value that may stand inside the dictionary of the rotation, or beside it, or nowhere."""
    places = (hf.get("rope_parameters"), hf.get("rope_scaling"), hf)
    stated = [place[key] for place in places if place and place.get(key) is not None]
    if any(value != stated[0] for value in stated):
        raise ValueError(
            f"config.json gives {key} as {stated[0]} and as {stated[-1]} (it stands in two of "
            "rope_parameters, rope_scaling and beside them); make them equal in a copy of "
            "config.json"
        )
    # Where only the dictionary that is passed over has it, transformers takes the default.
    return given.get(key, hf.get(key, default))


def _scaling(hf: dict[str, Any], given: dict[str, Any]) -> dict[str, Any] | None:
    """Llama 3's scaling with all of its values, or None."""
    kinds = {given[key] for key in ("rope_type", "type") if given.get(key) is not None}
    if len(kinds) > 1:
        raise ValueError(
            f"config.json rope_scaling has rope_type={given['rope_type']} and "
            f"type={given['type']}; leave type out in a copy of config.json"
        )
    kind = next(iter(kinds), "default")
    if kind not in ("default", "llama3"):
        raise ValueError(f"rope_scaling type '{kind}' is not supported; supported: default, llama3")
    unknown = sorted(key for key in set(given) - _KNOWN if given[key] is not None)
    if unknown:
        raise ValueError(f"config.json rope_scaling holds {unknown}, which no mapping here reads")
    if kind == "default":
        return None
    original = hf.get(_ORIGINAL, given.get(_ORIGINAL, hf.get("max_position_embeddings")))
    said = {**given, _ORIGINAL: original}
    for key in ("factor", *LLAMA3_SCALING):
        if said.get(key) is None:
            raise ValueError(f"config.json rope_scaling of type llama3 lacks {key}")
    for key, value in LLAMA3_SCALING.items():
        if said[key] != value:
            raise ValueError(
                f"rope_scaling {key}={said[key]} is not supported: Megatron-Core fixes it to "
                f"{value}"
            )
    return {"rope_type": kind, "factor": said["factor"], **LLAMA3_SCALING}
