"""The sizes of a model in the arguments of a training run, for the section ``model:`` of plan."""

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from nemo_minitron.checkpoint.foreign.argument_list import Given
from nemo_minitron.checkpoint.foreign.argument_tables import MODEL
from nemo_minitron.checkpoint.foreign.megatron_fields import match_family, model_fields
from nemo_minitron.checkpoint.foreign.megatron_stated import Stated, of_args, of_core
from nemo_minitron.config.model import ModelConfig
from nemo_minitron.documents import JsonObject

_ARGS_DEFAULTS: JsonObject = {
    "untie_embeddings_and_output_weights": False,
    "swiglu": False,
    "position_embedding_type": "learned_absolute",
    "normalization": "LayerNorm",
    "norm_epsilon": 1e-5,
    "bias_gelu_fusion": True,
}
"""What Megatron-LM's parser says where nothing is given, and a checkpoint would hold."""

_PATTERNS = ("moe_layer_freq", "linear_attention_freq", "window_attn_skip_freq", "no_rope_freq")
"""Arguments that may say the layers as an expression of Python: ``([0]*1+[1]*3)*2``."""
_MOST_LAYERS = 10_000


class _Read(Mapping[str, Any]):
    """A mapping that remembers which of its values were read."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values, self.asked = values, set[str]()

    def __getitem__(self, key: str) -> Any:
        self.asked.add(key)
        return self._values[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


@dataclass
class ModelRead:
    """The architecture that the arguments describe.

    Attributes:
        config: the model, or None where it cannot be known.
        read: arguments that were looked at.
        left: those of them that were not taken over, and why.
        note: why there is no model.
    """

    config: ModelConfig | None = None
    read: set[str] = field(default_factory=lambda: set(MODEL))
    left: dict[str, str] = field(default_factory=dict)
    note: str = ""

    def keys(self) -> JsonObject:
        """Return fields of the model that are not at their defaults."""
        if self.config is None:
            return {}
        said = {f.name: (getattr(self.config, f.name), f.default) for f in fields(ModelConfig)}
        dropped = ("hf", "kept_layers")
        return {k: value for k, (value, d) in said.items() if value != d and k not in dropped}


def _layers(node: ast.expr) -> list[int]:
    """What an expression of lists, ``+`` and ``*`` stands for; any other is a ``ValueError``."""
    found: list[Any] | None = None
    if isinstance(node, ast.List):
        found = [getattr(one, "value", None) for one in node.elts]
    elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        found = _layers(node.left) + _layers(node.right)
    elif isinstance(node, ast.BinOp) and isinstance(node.right, ast.Constant):
        times = node.right.value if isinstance(node.op, ast.Mult) else None
        if isinstance(times, int) and times <= _MOST_LAYERS:
            found = _layers(node.left) * times
    if found is None or len(found) > _MOST_LAYERS or not all(isinstance(n, int) for n in found):
        raise ValueError("it is no list of layers")
    return found


def _pattern(given: Given, name: str) -> list[int]:
    """Return the layers that an argument says as an expression."""
    text = given.values[name]
    try:
        return _layers(ast.parse(str(text), mode="eval").body)
    except (SyntaxError, ValueError, RecursionError):
        raise ValueError(
            f"{given.name(name)}={text} must be a number, or lists with + and *, such as "
            "([0]*1+[1]*3)"
        ) from None


def _stated(given: Given, found: ModelRead) -> Stated:
    if given.bridge is not None:
        return of_core(given.bridge, "section model")
    args = {**_ARGS_DEFAULTS, **given.values}
    args |= {name: _pattern(given, name) for name in _PATTERNS if isinstance(args.get(name), str)}
    if args.get("use_rotary_position_embeddings"):
        args["position_embedding_type"] = "rope"
    if args.get("disable_bias_linear"):
        args["add_bias_linear"] = False
    if args.get("ffn_hidden_size") is None and isinstance(args.get("hidden_size"), int):
        hidden = int(args["hidden_size"])
        args["ffn_hidden_size"] = hidden * 8 // 3 // 64 * 64 if args["swiglu"] else 4 * hidden
    if args.get("max_position_embeddings") is None:
        args["max_position_embeddings"] = args.get("seq_length")
    one = (
        "apply_layernorm_1p" if args.get("apply_layernorm_1p") else "layernorm_zero_centered_gamma"
    )
    if args["normalization"] == "RMSNorm" and args.pop(one, False):
        found.left[given.name(one)] = "RMSNorm stores its weights as they are here, not less one"
    return of_args(args, "the argument list")


def read_model(given: Given) -> ModelRead:
    """Find the model; one that no family has is no error, but a note."""
    found = ModelRead()
    if "num_layers" not in given.values and "hybrid_layer_pattern" not in given.values:
        found.note = "no sizes of a model are given; minitron plan reads them in a checkpoint"
        return found
    vocabulary = _vocabulary(given)
    values: _Read | None = None
    try:
        stated = _stated(given, found)
        values = _Read(stated.values)
        sizes = model_fields(replace(stated, values=values), vocabulary or 128)
        found.read |= {stated.name(key) for key in values.asked} | values.asked
        config = match_family(stated, sizes)[1]
    except ValueError as error:
        found.note = f"no model.* is written: {error}"
        return found
    if vocabulary is None:
        found.note = (
            "no model.* is written, as nothing says the size of the vocabulary "
            f"({given.name('tokenizer_model')}={given.values.get('tokenizer_model')}); add "
            "--vocab-size N"
        )
        return found
    config.dtype = "bfloat16" if given.values.get("bf16") else "float32"
    found.config = config
    return found


def _vocabulary(given: Given) -> int | None:
    # A list does not say which version reads it: the newest does, unless it has what that lacks.
    older = "legacy_tokenizer" in given.values
    null = Stated("the list", given.values).null_vocabulary(before_core_0_18=older)
    size = null or given.values.get("vocab_size") or given.values.get("padded_vocab_size")
    return size if isinstance(size, int) else None
