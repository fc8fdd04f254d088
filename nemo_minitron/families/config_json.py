"""The keys of a config.json: an allow list, common to all families.

A key that nobody looks at may still change the network: Granite and MiniCPM are Llamas with a few
multipliers, and their config.json says so in keys that Llama has not. A model that runs but is not
the model is the worst outcome, so a key has to be one that the family's mapping reads, one that
only describes, or one at the value that changes nothing. Everything else is refused by name, and
the user may name it in ``source_ignore`` if it is known not to matter.
"""

from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import Any


def words(text: str) -> frozenset[str]:
    """Return names that stand in a text, with spaces between them."""
    return frozenset(text.split())


# Keys of transformers' PreTrainedConfig, in any version, that say nothing of the network.
_DESCRIBES = words(
    # what it is and who wrote it
    "architectures model_type _name_or_path name_or_path transformers_version _commit_hash license "
    "auto_map custom_pipelines tokenizer_class prefix transformers.js_config is_llama_config "
    "unsloth_version unsloth_fixed "
    # how it is stored and run
    "torch_dtype dtype use_cache return_dict use_return_dict output_attentions "
    "output_hidden_states torchscript use_bfloat16 tf_legacy_loss gradient_checkpointing "
    "cache_implementation attn_implementation _attn_implementation _attn_implementation_internal "
    "_attn_implementation_autoset _experts_implementation _experts_implementation_internal "
    "_flash_attn_2_enabled use_flash_attn chunk_size_feed_forward is_decoder output_past "
    # how it was trained: nothing drops out and nothing is initialised here
    "initializer_range attention_dropout hidden_dropout attn_pdrop embd_pdrop resid_pdrop dropout "
    "classifier_dropout output_router_logits router_aux_loss_coef router_jitter_noise "
    "pretraining_tp "
    # what says more of windows that are off (use_sliding_window), or says a size once more
    "max_window_layers n_ctx "
    # tokens, and how text is generated
    "bos_token_id eos_token_id pad_token_id unk_token_id sep_token_id decoder_start_token_id "
    "forced_bos_token_id forced_eos_token_id suppress_tokens begin_suppress_tokens bad_words_ids "
    "max_length min_length max_new_tokens do_sample early_stopping num_beams num_beam_groups "
    "num_return_sequences diversity_penalty temperature top_k top_p typical_p repetition_penalty "
    "length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size output_scores "
    "return_dict_in_generate remove_invalid_values exponential_decay_length_penalty "
    "model_max_length max_sequence_length "
    # other tasks than the next token
    "id2label label2id num_labels problem_type finetuning_task task_specific_params "
    "summary_activation summary_first_dropout summary_proj_to_labels summary_type "
    "summary_use_proj predict_special_tokens n_special"
)
# Keys of other networks (or switches of these) -> the values that leave the network as it is.
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "tie_encoder_decoder": (False,),
    "pruned_heads": ({},),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "qkv_bias": (False,),
    "use_bias": (False,),
    "bias": (False,),
    "use_qk_norm": (False,),
    "qk_layernorm": (False,),
    "use_sliding_window": (False,),
    "rope_interleaved": (False,),
    "use_mrope": (False,),
    "position_embedding_type": ("rope",),
    "alibi": (False,),
    "parallel_attn": (False,),
    "use_parallel_residual": (False,),
    "num_nextn_predict_layers": (0,),
    # what multiplies or caps embeddings, attention, residuals and logits
    "embedding_multiplier": (1,),
    "scale_emb": (1,),
    "residual_multiplier": (1,),
    "logits_scaling": (1,),
    "logit_scale": (1,),
    "use_mup": (False,),
}
# What Llama and what GPT-2 call them.
_SIZES = (
    ("hidden_size", "n_embd"),
    ("num_attention_heads", "n_head"),
    ("num_hidden_layers", "n_layer"),
)
_WAY_OUT = (
    "If the network is the same without {them}, set source_ignore=[{names}]; else the model cannot "
    "be imported"
)


def of_layers(hf: Mapping[str, Any]) -> dict[str, tuple[Any, ...]]:
    """Return values of keys that depend on sizes, at which they change nothing."""
    sizes = [hf.get(one) or hf.get(other) for one, other in _SIZES]
    if not all(isinstance(size, int) and size > 0 for size in sizes):
        return {}  # which is refused for other reasons
    hidden, heads, layers = (int(size) for size in sizes if size)
    head_dim = hf.get("head_dim") or hidden // heads
    return {
        "attention_multiplier": (head_dim**-0.5,),
        "query_pre_attn_scalar": (head_dim,),
        "kv_channels": (head_dim,),
        "no_rope_layers": ([1] * layers,),
        "layer_types": (["full_attention"] * layers,),
    }


def unknown_keys(
    hf: Mapping[str, Any],
    reads: Collection[str],
    neutral: Mapping[str, tuple[Any, ...]] = MappingProxyType({}),
) -> dict[str, str]:
    """Return keys of a config.json that may change the network and that no mapping looks at.

    Args:
        hf: config.json.
        reads: keys that the family's mapping reads; it refuses their wrong values itself.
        neutral: other keys of the family's published files -> values that change nothing there.

    Returns:
        Key -> what is known of it, for a message. A key that is null counts as absent.
    """
    neutral = {**_NEUTRAL, **of_layers(hf), **neutral}
    found = {}
    for key, value in hf.items():
        if value is None or key in reads or key in _DESCRIBES:
            continue
        if key not in neutral:
            found[key] = f"{key}={_short(value)}"
        elif value not in neutral[key]:
            only = " or ".join(map(_short, neutral[key]))
            found[key] = f"{key}={_short(value)} (only {only} would change nothing)"
    return found


def check_keys(
    family: str,
    hf: Mapping[str, Any],
    reads: Collection[str],
    neutral: Mapping[str, tuple[Any, ...]] = MappingProxyType({}),
) -> None:
    """Refuse a config.json with keys of ``unknown_keys``, whose arguments these are.

    Raises:
        ValueError: names the keys, their values, and ``source_ignore``.
    """
    found = unknown_keys(hf, reads, neutral)
    if found:
        one = len(found) == 1
        raise ValueError(
            f"config.json has keys that the mapping of family '{family}' does not know: "
            f"{', '.join(found.values())}. "
            + _WAY_OUT.format(them="it" if one else "them", names=",".join(found))
        )


def _short(value: Any) -> str:
    """Return the value as JSON writes it, shortened to 60 characters for a message."""
    word = {True: "true", False: "false"}.get(value) if isinstance(value, bool) else None
    text = word or str(value)
    return text if len(text) <= 60 else text[:57] + "..."
