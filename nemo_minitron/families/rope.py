"""Rotary positions as config.json gives them, read as transformers reads them.

Three generations of config.json are about: ``rope_theta`` and ``rope_scaling`` beside each other,
all of it in ``rope_parameters``, and both. What transformers makes of them is in its
``convert_rope_params_to_dict``: ``rope_scaling`` before ``rope_parameters``, what is inside before
what is beside. Where two places disagree programs differ, and so they are refused.
"""

import math
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
_SHARE = "partial_rotary_factor"
_ORIGINAL = "original_max_position_embeddings"
BETA = "llama_4_scaling_beta"
"""Key beside those of YaRN: how fast the factor of queries grows (``families.ministral``)."""
# Kind of scaling -> the values that it needs beside its name.
_NEEDS = {
    "default": (),
    "llama3": ("factor", *LLAMA3_SCALING),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor", _ORIGINAL),
    "longrope": ("short_factor", "long_factor", _ORIGINAL),
}
REFUSED_SCALINGS = (
    "`rope_scaling` other than `linear`, `dynamic`, `yarn`, `longrope` and `llama3`: the mapping "
    "has no other",
    "sequences longer than `max_position_embeddings` where `rope_scaling` is `dynamic`: its "
    "frequencies would change with every token",
)
"""What the documentation says of every family whose positions are rotary."""
_OPTIONAL = {
    "yarn": words("attention_factor mscale mscale_all_dim beta_fast beta_slow truncate"),
    "longrope": words("attention_factor short_factor long_factor"),
}
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
        scaling: ``rope_scaling`` with every value of its kind, or None.
    """

    base: float
    share: float
    scaling: dict[str, Any] | None


def read_rope(hf: dict[str, Any], base: float = 10000.0, share: float = 1.0) -> Rope:
    """Return rotary positions of a config.json.

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
    share = 1.0 if rotated is None else float(rotated)
    scaling = _scaling(hf, {**given, _SHARE: share})
    if share != 1 and scaling is not None and scaling["rope_type"] == "yarn":
        raise ValueError(
            f"rope_scaling type 'yarn' with partial_rotary_factor={share} is not supported; only "
            "with 1, as Megatron-Core has it"
        )
    return Rope(base=float(found["rope_theta"]), share=share, scaling=scaling)


def _check_dictionary(key: str, value: Any) -> None:
    if value is not None and not isinstance(value, dict):
        raise ValueError(f"config.json {key}={value!r} must be a dictionary or null")
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
    """Return the scaling with all of its values, or None."""
    kinds = {given[key] for key in ("rope_type", "type") if given.get(key) is not None}
    if len(kinds) > 1:
        raise ValueError(
            f"config.json rope_scaling has rope_type={given['rope_type']} and "
            f"type={given['type']}; leave type out in a copy of config.json"
        )
    kind = next(iter(kinds), "default")
    if kind not in _NEEDS:
        raise ValueError(
            f"rope_scaling type '{kind}' is not supported; supported: {', '.join(_NEEDS)}"
        )
    known = _KNOWN | _OPTIONAL.get(kind, frozenset())
    unknown = sorted(key for key in set(given) - known if given[key] is not None)
    if unknown:
        raise ValueError(f"config.json rope_scaling holds {unknown}, which no mapping here reads")
    if kind == "default":
        return None
    original = hf.get(_ORIGINAL, given.get(_ORIGINAL, hf.get("max_position_embeddings")))
    said = {**given, _ORIGINAL: original}
    for key in _NEEDS[kind]:
        if said.get(key) is None:
            raise ValueError(f"config.json rope_scaling of type {kind} lacks {key}")
    factor = said.get("factor", 1.0 if kind == "longrope" else None)
    if not isinstance(factor, int | float) or factor <= 0:
        raise ValueError(f"config.json rope_scaling.factor={factor!r} must be above 0")
    if kind == "llama3":
        _check_llama3(said)
    values = {key: said[key] for key in _NEEDS[kind]}
    more = {"yarn": _yarn, "longrope": _longrope}.get(kind)
    return {"rope_type": kind, **values, **(more(said, hf) if more else {})}


def _check_llama3(said: dict[str, Any]) -> None:
    for key, value in LLAMA3_SCALING.items():
        if said[key] != value:
            raise ValueError(
                f"rope_scaling {key}={said[key]} is not supported: Megatron-Core fixes it to "
                f"{value}"
            )


def _longrope(said: dict[str, Any], hf: dict[str, Any]) -> dict[str, Any]:
    """Return the factor of LongRoPE on sines and cosines (2402.13753), for any length.

    Raises:
        ValueError: a list of factors does not have one number above 0 for each frequency.
    """
    head_dim = hf.get("head_dim") or hf["hidden_size"] // hf["num_attention_heads"]
    count = int(head_dim * said[_SHARE]) // 2
    for key in ("short_factor", "long_factor"):
        factors = said[key]
        numbers = isinstance(factors, list) and all(isinstance(x, int | float) for x in factors)
        if not numbers or len(factors) != count or min(factors) <= 0:
            raise ValueError(
                f"config.json rope_scaling.{key} must be a list of {count} numbers above 0, one "
                "for each frequency that a head is rotated with"
            )
    stated, original = said.get("attention_factor"), said[_ORIGINAL]
    factor = said.get("factor") or hf.get("max_position_embeddings", original) / original
    usual = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    return {"attention_factor": usual if stated is None else float(stated)}


def _yarn(said: dict[str, Any], _: dict[str, Any]) -> dict[str, Any]:
    """Read the other fields of YaRN; transformers treats null and 0 as absent."""
    factor, wanted = said["factor"], _attention_factor(said)
    if factor <= 1 and wanted != 1:
        raise ValueError(
            f"rope_scaling of type yarn has attention_factor={wanted} and factor={factor}, not "
            "supported: Megatron-Core has no such factor unless factor is above 1"
        )
    return {
        "beta_fast": said.get("beta_fast") or 32,
        "beta_slow": said.get("beta_slow") or 1,
        "truncate": bool(said.get("truncate", True)),
        "attention_factor": wanted,
    }


def _attention_factor(said: dict[str, Any]) -> float:
    """Return the factor of YaRN on sines and cosines (2309.00071, section 3.4)."""
    stated = said.get("attention_factor")
    if stated is not None:
        return float(stated)
    factor, own, base = said["factor"], said.get("mscale"), said.get("mscale_all_dim")
    if own and base:
        return concentration(factor, own) / concentration(factor, base)
    return concentration(factor)


def concentration(factor: float, scale: float = 1.0) -> float:
    """Return the factor of sines and cosines that YaRN takes for a factor of the length."""
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0


YARN_ARGUMENTS = ("rotary_scaling_factor", "mscale", "mscale_all_dim")
"""Of ``yarn_fields``, those that are arguments of Megatron-LM without ``yarn_`` in front."""


def yarn_fields(scaling: dict[str, Any] | None) -> dict[str, Any]:
    """Return YaRN in the words of Megatron's configs; nothing where the scaling is another one.

    Megatron computes the factor of sines and cosines from two numbers, the second of which is
    0 here.
    """
    if scaling is None or scaling["rope_type"] != "yarn":
        return {}
    factor, wanted = scaling["factor"], scaling["attention_factor"]
    usual = wanted == concentration(factor)
    return {
        "yarn_rotary_scaling_factor": factor,
        "yarn_original_max_position_embeddings": scaling[_ORIGINAL],
        "yarn_beta_fast": scaling["beta_fast"],
        "yarn_beta_slow": scaling["beta_slow"],
        "yarn_mscale": None if usual else (wanted - 1) / (0.1 * math.log(factor)),
        "yarn_mscale_all_dim": None if usual else 0.0,
        "yarn_correction_range_round_to_int": scaling["truncate"],
        **({BETA: scaling[BETA]} if BETA in scaling else {}),
    }


def attention_fields(scaling: dict[str, Any] | None) -> dict[str, Any]:
    """Return the fields about rotary positions that Megatron's attention reads.

    It has a factor of sines and cosines for YaRN alone, which is that of LongRoPE here.
    """
    if scaling is None or scaling["rope_type"] != "longrope":
        return yarn_fields(scaling)
    return {
        "yarn_rotary_scaling_factor": math.e,
        "yarn_mscale": (scaling["attention_factor"] - 1) / 0.1,
        "yarn_mscale_all_dim": 0.0,
    }


def latent_fields(scaling: dict[str, Any] | None) -> dict[str, Any]:
    """Return rotary positions in the words of Megatron's ``MLATransformerConfig``.

    Its attention scores are multiplied by the square of ``concentration(factor, mscale_all_dim)``,
    and its sines and cosines by a quotient that ``mscale`` is chosen for here.
    """
    if scaling is None:
        return {"rope_type": "rope", "rotary_scaling_factor": 1.0}
    factor, everywhere = scaling["factor"], scaling["mscale_all_dim"]
    wanted = scaling["attention_factor"] * concentration(factor, everywhere)
    return {
        "rope_type": "yarn",
        "rotary_scaling_factor": factor,
        "original_max_position_embeddings": scaling[_ORIGINAL],
        "beta_fast": scaling["beta_fast"],
        "beta_slow": scaling["beta_slow"],
        "mscale": (wanted - 1) / (0.1 * math.log(factor)) if factor > 1 else 1.0,
        "mscale_all_dim": everywhere,
    }
