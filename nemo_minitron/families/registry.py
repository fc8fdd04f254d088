"""Looks families up by name or by Hugging Face architecture."""

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from nemo_minitron.config.model import ModelConfig
from nemo_minitron.families.config_json import of_layers, unknown_keys
from nemo_minitron.families.deepseek import DEEPSEEK_V2, DEEPSEEK_V3
from nemo_minitron.families.gemma import GEMMA2, GEMMA3
from nemo_minitron.families.glm4_moe import GLM4_MOE
from nemo_minitron.families.gpt2 import GPT2
from nemo_minitron.families.gpt_oss import GPT_OSS
from nemo_minitron.families.granite import GRANITE
from nemo_minitron.families.letters import by_letters
from nemo_minitron.families.llama import LLAMA
from nemo_minitron.families.ministral import MINISTRAL, MINISTRAL3
from nemo_minitron.families.mixtral import MIXTRAL
from nemo_minitron.families.nemotron import NEMOTRON
from nemo_minitron.families.nemotron_h import NEMOTRON_H
from nemo_minitron.families.olmo2 import OLMO2
from nemo_minitron.families.phi3 import PHI3
from nemo_minitron.families.prediction import MTP_LAYERS
from nemo_minitron.families.qwen import QWEN2, QWEN3
from nemo_minitron.families.qwen2_moe import QWEN2_MOE
from nemo_minitron.families.qwen3_5 import QWEN3_5, QWEN3_5_MOE
from nemo_minitron.families.qwen3_moe import QWEN3_MOE
from nemo_minitron.families.qwen3_next import QWEN3_NEXT
from nemo_minitron.families.smollm3 import SMOLLM3
from nemo_minitron.families.table import Family
from nemo_minitron.families.windows import width_of
from nemo_minitron.runtime.plugins import with_added

_ALL = (
    LLAMA,
    QWEN2,
    QWEN3,
    NEMOTRON,
    PHI3,
    GPT2,
    MIXTRAL,
    QWEN2_MOE,
    QWEN3_MOE,
    SMOLLM3,
    OLMO2,
    GRANITE,
    GEMMA2,
    GEMMA3,
    NEMOTRON_H,
    DEEPSEEK_V2,
    DEEPSEEK_V3,
    GLM4_MOE,
    GPT_OSS,
    MINISTRAL,
    MINISTRAL3,
    QWEN3_NEXT,
    QWEN3_5,
    QWEN3_5_MOE,
)
FAMILIES: dict[str, Family] = with_added("families", {family.name: family for family in _ALL})

_ENDLESS = 1 << 62

# Keys of config.json that name classes in Python files.
_CODE = ("auto_map", "custom_pipelines")
# What the weights are stored in, which no stage changes.
_DTYPES = ("torch_dtype", "dtype")
# Of a Qwen; transformers 5 writes the second.
_EXPERTS, _RENAMED = "num_experts", "num_local_experts"
# The first finds the sizes that changed, the second what the source left out and now has to say.
_PASSES = 4


def _text_of(both: str) -> str:
    """Return how to take the text model out of one that reads images too."""
    return (
        "it reads images too; with transformers the text model is: both = "
        f"{both}ForConditionalGeneration.from_pretrained(FOLDER); text = AutoModelForCausalLM."
        "from_config(both.config.text_config).to(both.dtype); text.model.load_state_dict("
        "both.model.language_model.state_dict()); text.lm_head.load_state_dict("
        "both.lm_head.state_dict()); text.save_pretrained(TEXT), and the tokenizer's files beside "
        "it"
    )


UNSUPPORTED: dict[str, str] = {
    "GemmaForCausalLM": "the first Gemma has no table; Gemma 2 and 3 have",
    "Gemma3ForConditionalGeneration": _text_of("Gemma3"),
    "Mistral3ForConditionalGeneration": _text_of("Mistral3"),
    "Qwen3_5ForConditionalGeneration": _text_of("Qwen3_5"),
    "Qwen3_5MoeForConditionalGeneration": _text_of("Qwen3_5Moe"),
}
"""Architectures that people ask for and that do not open here as they are, and why."""


def family_of(config: ModelConfig) -> Family:
    """Return the family of a stored model; of a HybridModel with the table for its letters."""
    if config.family not in FAMILIES:
        raise ValueError(f"family '{config.family}' is unknown; known: {sorted(FAMILIES)}")
    return by_letters(FAMILIES[config.family], config)


def family_of_hf(hf_config: dict[str, Any]) -> Family:
    """Return the family of a Hugging Face config.json.

    transformers opens a model by ``model_type``; other programs by ``architectures``. Where both
    are there they have to name one network. A bare model (``LlamaModel``) is of its family, too.

    Raises:
        ValueError: no family lists its architecture, or the two disagree.
    """
    listed, kind = hf_config.get("architectures") or [], hf_config.get("model_type")
    if not isinstance(listed, list) or not all(isinstance(name, str) for name in listed):
        raise ValueError(f"architectures={listed!r} in config.json is not a list of names")
    known = {
        name: (family, own)
        for family in FAMILIES.values()
        for name, own in family.hf_architectures.items()
    }
    bare = {_bare(name): name for name in known}
    named = [bare.get(name, name) for name in listed]
    named = named or [name for name, (_, own) in known.items() if own == kind]
    found = next((known[name] for name in named if name in known), None)
    if found is None:
        why = "".join(f" ({UNSUPPORTED[name]})" for name in named if name in UNSUPPORTED)
        said = f"architectures={listed}" if listed or not kind else f"model_type={kind}"
        raise ValueError(
            f"{said} in config.json is not supported{why}; supported: {sorted(known)}; set source "
            "to such a model"
        )
    family, own = found
    if kind is not None and kind != own:
        raise ValueError(
            f"model_type={kind} and architectures={listed} in config.json disagree (transformers "
            f"goes by the first): that architecture has model_type={own}; take config.json and "
            "weights from one model"
        )
    return family


def _bare(architecture: str) -> str:
    """Name of the class without the output layer."""
    return architecture.replace("ForCausalLM", "Model").replace("LMHeadModel", "Model")


def read_config(
    hf_config: dict[str, Any], passed_over: Sequence[str] = ()
) -> tuple[Family, ModelConfig]:
    """Return the family and sizes of a config.json; ``ModelConfig.hf`` is the whole of it.

    Args:
        hf_config: config.json.
        passed_over: keys that are not looked at (``source_ignore``).

    Raises:
        ValueError: unknown architecture, a size is missing or no number, a key that may change the
            network is unknown, or ``passed_over`` names one that is not there or that is read.
    """
    family = family_of_hf(hf_config)
    for key in passed_over:
        if key not in hf_config and not (key == MTP_LAYERS and family.left_out):
            raise ValueError(f"source_ignore={list(passed_over)}: config.json has no {key}")
        if key in family.hf_reads and key != MTP_LAYERS:
            raise ValueError(
                f"source_ignore={list(passed_over)}: {key} is read, not unknown; change it in a "
                "copy of config.json, or leave it out of source_ignore"
            )
    known = {key: value for key, value in hf_config.items() if key not in passed_over}
    try:
        config = family.from_hf(known)
    except KeyError as error:
        raise ValueError(f"config.json lacks {error}") from error
    except (TypeError, AttributeError, ZeroDivisionError) as error:
        raise ValueError(f"a size in config.json is not a number above 0: {error}") from error
    dropped = dict.fromkeys({MTP_LAYERS} & {*passed_over}, 0)
    config.hf = {**hf_config, **dropped}
    return family, config


def written_config(config: ModelConfig) -> dict[str, Any]:
    """Return config.json of a model: its source's, with what the stages changed and nothing else.

    Keys stay as they came, also those of which transformers knows two spellings, and what the
    source leaves out stays left out as long as it means the same. A model that was not opened from
    a config.json gets a whole one. Python files that the source names are not carried over.
    """
    family = family_of(config)
    wanted = {key: value for key, value in family.to_hf(config).items() if key not in _CODE}
    source = {key: value for key, value in config.hf.items() if key not in _CODE}
    if not {"model_type", "architectures"} & set(source):  # a part of one, or GGUF, or Megatron
        # Unsaid, it is that of some published model, which the vocabulary may not have.
        return {**wanted, "pad_token_id": wanted.get("pad_token_id")}
    layers = of_layers(source)
    wanted = _spelled(wanted, source)
    wanted = {
        key: value
        for key, value in wanted.items()
        if key not in _DTYPES and (key not in layers or key in family.hf_reads)
    }
    # What the source said, of the weights that are there now: they may have been trained in others.
    written = {k: config.dtype if k in _DTYPES and v else v for k, v in source.items()}
    for _ in range(_PASSES):
        said = _spelled(_said(family, written), source)
        changed = {k: v for k, v in wanted.items() if k not in said or said[k] != v}
        if not changed:
            return written
        written = {**written, **changed}
        for key, neutral in of_layers(written).items():  # of layers that are gone
            if source.get(key) in layers.get(key, ()):
                written[key] = neutral[0]
    return {**written, **wanted}


def _spelled(values: dict[str, Any], source: dict[str, Any]) -> dict[str, Any]:
    """Return the values with the number of experts under the name that the source uses."""
    if _RENAMED not in source or _EXPERTS not in values:
        return values
    spelled = {**values, _RENAMED: values[_EXPERTS]}
    if _EXPERTS not in source:
        del spelled[_EXPERTS]
    return spelled


def _said(family: Family, hf: dict[str, Any]) -> dict[str, Any]:
    """Return the meaning of a config.json as the keys that ``Family.to_hf`` writes.

    Nothing if it cannot be read, or if transformers opens its sizes with another class only.
    """
    passed_over = set(unknown_keys(hf, family.hf_reads))
    known = {key: value for key, value in hf.items() if key not in passed_over}
    try:
        means = family.to_hf(family.from_hf(known))
    except (KeyError, ValueError):
        return {}
    if hf.get("model_type", means["model_type"]) != means["model_type"]:
        return {}
    return {**hf, **means}


def longest_sequence(config: ModelConfig) -> int | None:
    """Return the longest sequence that a model here takes as transformers does; None if any is.

    A sliding window of ``max_position_embeddings`` or more is no window up to there, and left out.
    Sequences that are longer than such a window would meet it.
    """
    limits = [config.max_seq_length]
    if config.window_size is None and config.hf.get("sliding_window"):
        endless = {**config.hf, "max_position_embeddings": _ENDLESS}
        with suppress(ValueError):  # transformers' Llama has no windows, whatever is said
            limits.append(width_of(FAMILIES[config.family].from_hf(endless)))
    return min(filter(None, limits), default=None)
