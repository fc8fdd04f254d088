"""GGUF files (llama.cpp): Llama weights, dequantised lazily, with Hugging Face names and row order.

Names come from the ``gguf`` package's own map and values from its own dequantisation. Two facts are
ours: the rows of q and k are stored permuted for llama.cpp's rotary layout, and GGUF keeps sizes in
metadata fields, of which ``_config`` makes a config.json. Letters: n heads, d head dim, h hidden.
"""

import sys
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFReader, ReaderTensor, get_tensor_name_map
from gguf.constants import MODEL_ARCH
from gguf.quants import dequantize
from torch import Tensor

from nemo_minitron.checkpoint.gguf_header import check_header
from nemo_minitron.checkpoint.hf_refusals import refuse_pointer
from nemo_minitron.checkpoint.lazy import LazyTensor, Store
from nemo_minitron.documents import JsonObject
from nemo_minitron.families.config_json import words
from nemo_minitron.families.registry import family_of_hf

# Types kept as they are; all others become float32.
_PLAIN = {Kind.F32: torch.float32, Kind.F16: torch.float16, Kind.BF16: torch.bfloat16}
_ARCHITECTURE = "llama."
_QUANTISED = {Kind[name] for name in words("Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q2_K Q3_K Q4_K Q5_K Q6_K")}


class _Reader(GGUFReader):
    """Keeps the memory map as a plain array, whose thousands of slices are three times faster."""

    @property
    def data(self) -> np.ndarray:
        return self._data

    @data.setter
    def data(self, mapped: np.memmap) -> None:
        self._data = mapped.view(np.ndarray)


@lru_cache(maxsize=2)
def _parse(path: Path, size: int, mtime_ns: int) -> GGUFReader:
    """Parsing a large vocabulary takes a second, and a stage opens its source more than once."""
    try:
        check_header(path)
        return _Reader(path)
    except (ValueError, IndexError, KeyError, OSError, OverflowError, TypeError) as error:
        raise ValueError(
            f"{path} is not a GGUF file, or is truncated or damaged: {error}"
        ) from error


def open_reader(path: Path) -> GGUFReader:
    """Return a memory-mapped GGUF file.

    Raises:
        ValueError: the file is missing, truncated or not GGUF.
    """
    if not path.is_file():
        raise ValueError(f"{path} does not exist")
    refuse_pointer(path)
    stat = path.stat()
    return _parse(path, stat.st_size, stat.st_mtime_ns)


def fields_of(path: Path) -> Callable[..., Any]:
    """Return a look-up ``get(key, default)`` of metadata; without a default it must be set."""
    reader = open_reader(path)

    def get(key: str, *default: object) -> Any:
        field = reader.get_field(key)
        if field is None:
            if default:
                return default[0]
            raise ValueError(f"{path} lacks the metadata field {key}")
        value = field.contents()
        # float32 fields: the shortest decimal that means the same (1e-05, not 9.99999974e-06)
        return float(str(np.float32(value))) if isinstance(value, float) else value

    return get


_FIELD_NAMES = {"unk": "unknown", "pad": "padding"}


def special_token(get: Callable[..., Any], name: str, count: int) -> int | None:
    """Return the id of ``bos``, ``eos``, ``unk`` or ``pad``, if the file names one.

    An id that none of ``count`` tokens has stands for none, as llama.cpp has it.
    """
    index = get(f"tokenizer.ggml.{_FIELD_NAMES.get(name, name)}_token_id", None)
    return index if type(index) is int and 0 <= index < count else None


def _refuse(path: Path, what: str, field: str) -> None:
    raise ValueError(
        f"{path}: {field} {what}, which config.json cannot say; set source to the Hugging Face "
        "folder of this model"
    )


def _number(
    path: Path, get: Callable[..., Any], field: str, *default: float, kind: type[float] = int
) -> Any:
    """Return a size of the network; a list of one a layer is taken if all are equal."""
    value = get(field, *default)
    if isinstance(value, list) and value and value.count(value[0]) == len(value):
        value = value[0]
    if type(value) is not kind or not value > 0:
        raise ValueError(
            f"{path}: {field}={value} must be of type {kind.__name__}, above 0 and the same for "
            "every layer; set source to the Hugging Face folder of this model"
        )
    return value


def _check_whole(path: Path, get: Callable[..., Any]) -> None:
    """Refuse files that hold something else than one whole model in the order of this machine."""
    kind, files = get("general.type", "model"), get("split.count", 1)
    if kind != "model":
        raise ValueError(
            f"{path}: general.type={kind} is not supported; set source to a whole model (an "
            "adapter has to be merged into its base model first)"
        )
    if files not in (0, 1):
        raise ValueError(
            f"{path} is one of split.count={files} files; merge them (llama-gguf-split --merge "
            "FIRST-FILE WHOLE.gguf) and set source to the whole"
        )
    if open_reader(path).byte_order == "S":
        raise ValueError(
            f"{path} is in the byte order of another kind of machine; set source to the file in "
            f"that of this one ({sys.byteorder}-endian), or to the Hugging Face folder"
        )
    arch = get("general.architecture")
    if arch != "llama":
        raise ValueError(f"{path}: general.architecture={arch} is not supported; supported: llama")


def _check_supported(path: Path, get: Callable[..., Any], head_dim: int) -> None:
    if get("llama.expert_count", 0):
        _refuse(path, "is set (a mixture of experts)", "llama.expert_count")
    # llama.cpp scales linearly by a factor that stands there without a type; 0 means none.
    kind = get("llama.rope.scaling.type", None)
    factor = get("llama.rope.scaling.factor", get("llama.rope.scale_linear", 1))
    if kind != "none" and (kind is not None or factor not in (0, 1)):
        _refuse(path, "is set", "llama.rope.scaling")
    if any(tensor.name == "rope_freqs.weight" for tensor in open_reader(path).tensors):
        _refuse(path, "holds scaled rotary frequencies", "rope_freqs.weight")
    rotary = get("llama.rope.dimension_count", head_dim)
    if rotary != head_dim:
        _refuse(path, f"is {rotary} of {head_dim} (partial rotary)", "llama.rope.dimension_count")
    value_dim = get("llama.attention.value_length", head_dim)
    if value_dim != head_dim:
        _refuse(path, f"is {value_dim}, not {head_dim}", "llama.attention.value_length")


# Metadata of the architecture: what is read here, and what says nothing of the network.
_READ = words(
    "block_count context_length embedding_length feed_forward_length attention.head_count "
    "attention.head_count_kv attention.key_length attention.value_length vocab_size expert_count "
    "attention.layer_norm_rms_epsilon rope.dimension_count rope.freq_base rope.scaling.type "
    "rope.scale_linear rope.scaling.factor rope.scaling.original_context_length "
    "rope.scaling.finetuned tensor_data_layout"
)
# Others -> the value that changes nothing.
_NEUTRAL = {
    "expert_used_count": 0,
    "attention.causal": True,
    "use_parallel_residual": False,
    "attention.scale": 0,
    "embedding_scale": 1,
    "residual_scale": 1,
    "logit_scale": 1,
}


def _check_metadata(path: Path, get: Callable[..., Any], passed_over: Sequence[str]) -> None:
    """Refuse metadata of the architecture that may change the network and is not read."""
    names = [field for field in open_reader(path).fields if field.startswith(_ARCHITECTURE)]
    for name in passed_over:
        if name not in names or name.removeprefix(_ARCHITECTURE) in _READ:
            raise ValueError(
                f"source_ignore={list(passed_over)}: {name} is not a metadata field of {path} that "
                "is not read"
            )
    unknown = []
    for name in names:
        key = name.removeprefix(_ARCHITECTURE)
        if key in _READ or name in passed_over:
            continue
        if key not in _NEUTRAL or get(name) != _NEUTRAL[key]:
            unknown.append(name)
    if unknown:
        said = ", ".join(f"{name}={get(name)}" for name in unknown)
        raise ValueError(
            f"{path} has metadata that the mapping does not know: {said}. If the network is the "
            f"same without it, set source_ignore=[{','.join(unknown)}]; else set source to the "
            "Hugging Face folder of this model"
        )


def _check_vocabulary(path: Path, get: Callable[..., Any], rows: int) -> None:
    """Refuse embeddings of another size than the file's own tokenizer and metadata say."""
    tokens = get("tokenizer.ggml.tokens", None)
    for name, count in (
        ("llama.vocab_size", get("llama.vocab_size", rows)),
        ("tokenizer.ggml.tokens", rows if tokens is None else len(tokens)),
    ):
        if count != rows:
            raise ValueError(
                f"{path}: {name} says {count} tokens, but token_embd.weight has {rows} rows; set "
                "source to the Hugging Face folder of this model"
            )


def _config(path: Path, tensors: dict[str, ReaderTensor], passed_over: Sequence[str]) -> JsonObject:
    """Return the config.json of the model."""
    get = fields_of(path)
    _check_whole(path, get)
    number = partial(_number, path, get)
    hidden, heads = number("llama.embedding_length"), number("llama.attention.head_count")
    head_dim = number("llama.attention.key_length", hidden // heads)
    _check_metadata(path, get, passed_over)
    _check_supported(path, get, head_dim)
    if "token_embd.weight" not in tensors:
        raise ValueError(f"{path} lacks the tensor token_embd.weight")
    _check_vocabulary(path, get, int(tensors["token_embd.weight"].shape[-1]))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "num_hidden_layers": number("llama.block_count"),
        "hidden_size": hidden,
        "intermediate_size": number("llama.feed_forward_length"),
        "num_attention_heads": heads,
        "num_key_value_heads": number("llama.attention.head_count_kv", heads),
        "head_dim": head_dim,
        "vocab_size": int(tensors["token_embd.weight"].shape[-1]),
        "max_position_embeddings": number("llama.context_length"),
        "rms_norm_eps": number("llama.attention.layer_norm_rms_epsilon", kind=float),
        "rope_theta": number("llama.rope.freq_base", 10000.0, kind=float),
        "tie_word_embeddings": "output.weight" not in tensors,
    }
    for name in ("bos", "eos", "pad"):
        config[f"{name}_token_id"] = special_token(get, name, config["vocab_size"])
    return config


def _plain(tensor: ReaderTensor) -> Tensor:
    """Copy out of the memory map, type kept."""
    if tensor.tensor_type == Kind.BF16:  # numpy has no bfloat16: the reader gives bytes
        return torch.from_numpy(tensor.data.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(tensor.data.copy())


def _read(tensor: ReaderTensor, dtype: torch.dtype, heads: int) -> Tensor:
    """Return one tensor in Hugging Face row order.

    Args:
        tensor: entry of the memory-mapped file.
        dtype: dtype of the result.
        heads: heads whose rows are permuted (q and k); 0 for all other tensors.
    """
    if tensor.tensor_type in _PLAIN:
        value = _plain(tensor).to(dtype)
    else:
        value = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type)).to(dtype)
    if heads:
        # [n * d, h]: llama.cpp's (d/2, 2) back to the halves (2, d/2) of Hugging Face
        n, half = heads, value.shape[0] // heads // 2
        value = value.view(n, half, 2, -1).transpose(1, 2).reshape(value.shape)
    return value.contiguous()


def _dtypes(path: Path, tensors: dict[str, ReaderTensor]) -> Callable[[ReaderTensor], torch.dtype]:
    """Return dtype of every tensor: as stored if all matrices have one plain type, else float32.

    Norms stay float32, as GGUF stores them.
    """
    for tensor in tensors.values():
        if tensor.tensor_type not in _PLAIN and tensor.tensor_type not in _QUANTISED:
            known = sorted(kind.name for kind in {*_PLAIN, *_QUANTISED})
            raise ValueError(
                f"{path}: {tensor.name} is {tensor.tensor_type.name}; supported: {known}"
            )
    kinds = {t.tensor_type for t in tensors.values() if len(t.shape) > 1}
    uniform = len(kinds) == 1 and kinds <= set(_PLAIN)
    return lambda tensor: _PLAIN[tensor.tensor_type] if uniform else torch.float32


def open_gguf(path: Path, passed_over: Sequence[str] = ()) -> tuple[JsonObject, Store]:
    """Open a Llama GGUF file; weights are dequantised when read.

    Args:
        path: the .gguf file.
        passed_over: metadata fields that are not looked at (``source_ignore``).

    Returns:
        A config.json, and the store under Hugging Face names, rows in Hugging Face order. Quantised
        files give float32; plain ones keep their types.

    Raises:
        ValueError: not GGUF, damaged, another architecture, or something config.json cannot say.
    """
    tensors = {tensor.name: tensor for tensor in open_reader(path).tensors}
    hf = _config(path, tensors, passed_over)
    family = family_of_hf(hf)
    config = family.from_hf(hf)
    dtype_of = _dtypes(path, tensors)
    names = get_tensor_name_map(MODEL_ARCH.LLAMA, config.num_layers)
    store: Store = {}
    for _, row, layer in family.parameters(config):
        for pattern in row.hf:
            name = pattern.format(layer=layer)
            tensor = tensors.pop(
                names.get_name(name, try_suffixes=(".weight", ".bias")) or "", None
            )
            if tensor is None:
                raise ValueError(f"{path} lacks {name} (as {names.get_name(name, ('.weight',))})")
            heads = 0
            if ".q_proj." in name:
                heads = config.num_attention_heads
            elif ".k_proj." in name:
                heads = config.num_query_groups
            shape = tuple(int(size) for size in reversed(tensor.shape))
            dtype = dtype_of(tensor)
            read = partial(_read, tensor, dtype, heads)
            store[name] = LazyTensor(shape, dtype, read, origin=str(path))
    if tensors:
        raise ValueError(
            f"{path} holds tensors without a row in the table of family '{family.name}': "
            f"{sorted(tensors)[:5]}"
        )
    return hf, store
