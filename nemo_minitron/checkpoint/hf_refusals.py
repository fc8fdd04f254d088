"""Refusals of folders and files that look like a model but are not one, or only a part of one.

Everything here looks at names, headers and the first bytes of files, before a weight is read.
"""

from collections.abc import Iterable
from pathlib import Path

from nemo_minitron.documents import JsonObject

# What PEFT leaves in the folder of an adapter, or beside the weights of its base model.
ADAPTER_CONFIG = "adapter_config.json"
_ADAPTER_FILES = (ADAPTER_CONFIG, "adapter_model.safetensors", "adapter_model.bin")
# Parts of the names of tensors that belong to adapters (PEFT, NeMo, Megatron-Bridge).
_ADAPTER_NAMES = (".lora_", ".base_layer.", ".adapter.", ".adapter_layer.", ".ia3_")
_MERGE = (
    "merge it into its base model first (peft: PeftModel.from_pretrained(BASE, ADAPTER)"
    ".merge_and_unload().save_pretrained(FOLDER)) and set source to FOLDER"
)
# Where config.json says that weights are quantised (the second: older compressed-tensors).
_QUANTISED = ("quantization_config", "compression_config")
# A file that Git LFS keeps elsewhere is a text of three lines in a plain clone.
_POINTER = b"version https://git-lfs.github.com/"
_POINTER_BYTES = 1024
_UNQUANTISED = "set source to a model that is not quantised"
_WAYS_OUT = {
    "F64": "convert the weights to float32 first (model.float().save_pretrained(FOLDER)) and set "
    "source to FOLDER",
    "BOOL": "no weight of a model is of that dtype; save the model again",
    "C64": "no weight of a model is of that dtype; save the model again",
}


def refuse_adapter(folder: Path) -> None:
    """Refuse a folder in which an adapter lies, alone or beside its base model.

    transformers opens such a folder as the base model with the adapter applied, so the weights of
    the base model alone are another model.

    Raises:
        ValueError: names the file and says how to merge.
    """
    for name in _ADAPTER_FILES:
        if (folder / name).is_file():
            raise ValueError(
                f"{folder} holds an adapter ({name}), such as LoRA, which is not imported: {_MERGE}"
                f". If the base model alone is meant, set source to a folder without {name}"
            )


def refuse_adapter_names(where: object, names: Iterable[str]) -> None:
    """Refuse weights among which are those of an adapter.

    Args:
        where: file or folder, for the message.
        names: names of its tensors.

    Raises:
        ValueError: names one of them.
    """
    for name in names:
        if any(part in f".{name}" for part in _ADAPTER_NAMES):
            raise ValueError(
                f"{where} holds an adapter, such as LoRA (its tensor {name}): {_MERGE}"
            )


def refuse_pointer(path: Path) -> None:
    """Refuse a file that stands for one that Git LFS keeps elsewhere.

    Raises:
        ValueError: says what to run.
    """
    if not path.is_file() or path.stat().st_size > _POINTER_BYTES:
        return
    with path.open("rb") as file:
        start = file.read(len(_POINTER))
    if start == _POINTER:
        raise ValueError(
            f"{path} is a git-lfs pointer, not the file itself: run 'git lfs install' and "
            "'git lfs pull' in that folder, or download the file again"
        )


def refuse_quantised(path: Path, config: JsonObject) -> None:
    """Refuse a model whose config.json says that it is quantised.

    Raises:
        ValueError: names the key and the method.
    """
    for key in _QUANTISED:
        value = config.get(key)
        if value:
            method = value.get("quant_method") if isinstance(value, dict) else value
            raise ValueError(
                f"{path}: {key} says that these are quantised weights (quant_method={method}); set "
                "source to the unquantised model"
            )


def way_out_of_dtype(dtype: str) -> str:
    """Return advice for weights of an unsupported dtype (by its name in safetensors)."""
    if dtype.startswith(("F8_", "F6_", "F4")):
        return f"these are quantised weights; {_UNQUANTISED}"
    return _WAYS_OUT.get(dtype, _UNQUANTISED)
