"""Read the config file of a Megatron or NeMo checkpoint, written by any of these programs.

All kinds of files are brought to the names of Megatron-Core's TransformerConfig and GPTModel;
messages name a field as its own file does.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from nemo_minitron.families.rope import YARN_ARGUMENTS


@dataclass(frozen=True)
class Stated:
    """The values that a config file holds.

    Attributes:
        where: the file, for messages.
        values: by the names of TransformerConfig and GPTModel.
        names: what the file itself calls those that it calls otherwise.
    """

    where: str
    values: Mapping[str, Any]
    names: Mapping[str, str] = field(default_factory=dict)

    def name(self, key: str) -> str:
        """Return the name that the file uses for a field."""
        return self.names.get(key, key)

    def need(self, key: str) -> Any:
        """Return a value.

        Raises:
            ValueError: the file does not say it.
        """
        if self.values.get(key) is None:
            raise ValueError(f"{self.where} does not say {self.name(key)}")
        return self.values[key]

    def get(self, key: str, default: object) -> Any:
        """Return a value, or Megatron-Core's default where the file says none, or null."""
        value = self.values.get(key)
        return default if value is None else value

    def refuse(self, key: str, only: str) -> ValueError:
        """Return the error for a value that is not supported."""
        value = self.values.get(key)
        return ValueError(f"{self.where}: {self.name(key)}={value} is not supported; only {only}")

    def null_vocabulary(self, *, before_core_0_18: bool) -> int | None:
        """Return the tokens of a tokenizer without words, which Megatron-LM tells a size alone.

        Args:
            before_core_0_18: whether the program is older. There ``NullTokenizer`` adds a token for
                the end of a document; ``NullMultimodalTokenizer`` does so in every version.

        Returns:
            None for any other tokenizer, or where no size is given.

        Raises:
            ValueError: the size is no whole number.
        """
        kind, size = self.values.get("tokenizer_type"), self.values.get("vocab_size")
        if size is None or kind not in ("NullTokenizer", "NullMultimodalTokenizer"):
            return None
        if not isinstance(size, int):
            raise self.refuse("vocab_size", "a whole number")
        return size + (before_core_0_18 or kind != "NullTokenizer")


# Arguments of Megatron-LM that core 0.16.0 renamed to what TransformerConfig calls them. A newer
# run may still have the old name besides: --use-checkpoint-args sets it from an older checkpoint,
# and nothing reads it any more.
_RENAMED = {
    "layernorm_epsilon": "norm_epsilon",
    "layernorm_zero_centered_gamma": "apply_layernorm_1p",
}
# TransformerConfig's or GPTModel's name -> that of the argument of Megatron-LM.
_ARGS = {
    "num_moe_experts": "num_experts",
    "gated_linear_unit": "swiglu",
    "bias_activation_fusion": "bias_gelu_fusion",
    "share_embeddings_and_output_weights": "untie_embeddings_and_output_weights",
    "seq_length": "max_position_embeddings",
    "rope_scaling": "use_rope_scaling",
    "seq_len_interpolation_factor": "rotary_seq_len_interpolation_factor",
}
_ACTIVATION = "swiglu, squared_relu, geglu, quick_geglu"
_FACTOR = 8.0
_HETEROGENEOUS = ("heterogeneous_layers_config_path", "heterogeneous_layers_config_encoded_json")


_YARN_LENGTH = "yarn_original_max_position_embeddings"


def _yarn_names(args: Mapping[str, Any]) -> dict[str, str]:
    """Return names of YaRN in Megatron's configuration -> those of the arguments that say it."""
    latent, constant = args.get("multi_latent_attention"), args.get("enable_gpt_oss")
    if args.get("position_embedding_type") != "yarn" or latent or constant:
        return {}
    found = {f"yarn_{name}": name for name in YARN_ARGUMENTS if args.get(name) is not None}
    return {core: own for core, own in found.items() if args.get(core) is None}


def of_args(args: Mapping[str, Any], where: str) -> Stated:
    """Read Megatron-LM's arguments, ``args`` in ``common.pt`` (megatron/training/arguments.py)."""
    yarn, factor = _yarn_names(args), args.get("rope_scaling_factor", _FACTOR)
    if args.get("use_rope_scaling") and factor not in (None, _FACTOR):
        raise ValueError(
            f"{where}: rope_scaling_factor={factor} is not supported; Megatron-LM builds models "
            f"with {_FACTOR:g} whatever that argument says, so import the Hugging Face model"
        )
    names = {
        **{core: own for core, own in _ARGS.items() if own in args or core not in args},
        **{core: own for core, own in _RENAMED.items() if core not in args},
        **yarn,
    }
    stated = Stated(where, args, names)
    for name in ("untie_embeddings_and_output_weights", "swiglu", "position_embedding_type"):
        if args.get(name) is None:
            raise ValueError(f"{where} does not say {name}")
    # The last one is no argument of Megatron-LM: it goes with the modules that "spec" names.
    gated = any(args.get(name) for name in ("swiglu", "quick_geglu", "geglu"))
    activation = "silu" if args["swiglu"] else "gelu"
    if args.get("squared_relu"):
        activation = "squared_relu"
    elif args.get("quick_geglu"):
        activation = "quick_gelu"
    elif args.get("geglu"):
        activation = "gelu_tanh"
    renamed = {core: args.get(own) for core, own in names.items()}
    if not args.get("group_query_attention"):
        renamed["num_query_groups"] = stated.need("num_attention_heads")
    return Stated(
        where,
        {
            **args,
            **renamed,
            "gated_linear_unit": gated,
            "activation_func": activation,
            "share_embeddings_and_output_weights": not args["untie_embeddings_and_output_weights"],
            "heterogeneous_block_specs": any(args.get(name) for name in _HETEROGENEOUS),
            _YARN_LENGTH: args.get(_YARN_LENGTH) or (4096 if yarn else None),
        },
        {**names, "activation_func": _ACTIVATION, "heterogeneous_block_specs": _HETEROGENEOUS[0]},
    )


# TransformerConfig's or GPTModel's name -> that in the model_config.yaml of NeMo 1.
_NEMO1 = {
    "seq_length": "encoder_seq_length",
    "add_bias_linear": "bias",
    "add_qkv_bias": "qkv_bias",
    "activation_func": "activation",
    "gated_linear_unit": "activation",
    "rotary_percent": "rotary_percentage",
    "rope_scaling": "scale_positional_embedding",
    "layernorm_zero_centered_gamma": "normalization",
}
_NEMO1_ACTIVATIONS = {
    "gelu": "gelu",
    "approx-gelu": "gelu_tanh",
    "squared-relu": "squared_relu",
    "swiglu": "silu",
    "fast-swiglu": "silu",
}
_NEMO1_NORMS = {
    "layernorm": ("LayerNorm", False),
    "layernorm1p": ("LayerNorm", True),
    "rmsnorm": ("RMSNorm", False),
}


def of_nemo1(config: Mapping[str, Any], where: str) -> Stated:
    """``model_config.yaml`` of NeMo 1's MegatronGPTModel; absent keys have its defaults."""
    renamed = {core: config.get(own) for core, own in _NEMO1.items()}
    stated = Stated(where, {**config, **renamed}, _NEMO1)
    if not config.get("mcore_gpt"):
        raise stated.refuse("mcore_gpt", "true (models of Megatron-Core)")
    activation = config.get("activation", "gelu")
    if not isinstance(activation, str) or activation not in _NEMO1_ACTIVATIONS:
        raise stated.refuse("activation_func", str(sorted(_NEMO1_ACTIVATIONS)))
    norm = str(config.get("normalization", "layernorm")).lower()
    if norm not in _NEMO1_NORMS:
        raise stated.refuse("normalization", str(sorted(_NEMO1_NORMS)))
    if config.get("transformer_block_type", "pre_ln") != "pre_ln":
        raise stated.refuse("transformer_block_type", "pre_ln")
    name, zero_centered = _NEMO1_NORMS[norm]
    openai = activation == "gelu" and config.get("openai_gelu")
    values = {
        **stated.values,
        "normalization": name,
        "layernorm_zero_centered_gamma": zero_centered,
        "activation_func": "gelu_tanh" if openai else _NEMO1_ACTIVATIONS[activation],
        "gated_linear_unit": activation.endswith("glu"),
        "add_bias_linear": config.get("bias", True),
        "bias_activation_fusion": config.get("bias_activation_fusion", True),
        "share_embeddings_and_output_weights": config.get(
            "share_embeddings_and_output_weights", True
        ),
        "position_embedding_type": config.get("position_embedding_type", "learned_absolute"),
        # Not an option there.
        "apply_residual_connection_post_layernorm": False,
    }
    return Stated(where, values, _NEMO1)


def of_core(config: Mapping[str, Any], where: str) -> Stated:
    """Read fields of TransformerConfig and GPTModel as NeMo 2 and Megatron-Bridge write them.

    Newer Bridge versions keep TransformerConfig's in a section of its own, ``transformer``.
    """
    inner = config.get("transformer")
    flat = {**inner, **config} if isinstance(inner, Mapping) else dict(config)
    return Stated(where, flat)
