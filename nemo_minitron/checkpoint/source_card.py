"""What a source says of itself: its licence, from the model card or from GGUF metadata."""

import logging
import shutil
from pathlib import Path

from nemo_minitron.checkpoint.inside import inside
from nemo_minitron.documents import JsonObject, yaml_value

logger = logging.getLogger(__name__)

README = "README.md"
# Keys of a model card, which exporting carries over; GGUF has them with dots.
LICENCE_KEYS = ("license", "license_name", "license_link")
_TEXTS = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")


def read_source_card(source: Path) -> JsonObject:
    """Name, format and licence of a model.

    Args:
        source: what ``import`` opens.

    Returns:
        ``name`` (of the folder or file), ``format``, and those of ``LICENCE_KEYS`` that the source
        gives.
    """
    if source.is_dir():
        hugging_face = (source / "config.json").is_file()
        return {
            "name": source.resolve().name,
            "format": "Hugging Face" if hugging_face else "Megatron",
            **_licence(front_matter(source / README)),
        }
    if source.suffix == ".nemo":
        return {"name": source.name, "format": "NeMo"}
    from nemo_minitron.checkpoint.gguf import fields_of

    get = fields_of(source)
    fields = {key: get("general." + key.replace("_", "."), None) for key in LICENCE_KEYS}
    return {"name": source.name, "format": "GGUF", **_licence(fields)}


def _licence(fields: JsonObject) -> JsonObject:
    """A licence is a word, or several."""
    return {key: fields[key] for key in LICENCE_KEYS if isinstance(fields.get(key), str | list)}


def front_matter(readme: Path) -> JsonObject:
    """Return the YAML between the ``---`` lines that a model card begins with, if it has any."""
    if not readme.is_file():
        return {}
    lines = readme.read_text(encoding="utf-8", errors="replace").splitlines()
    if not lines or lines[0].strip() != "---":
        return {}
    ends = [number for number, line in enumerate(lines[1:], 1) if line.strip() == "---"]
    try:
        values = yaml_value("\n".join(lines[1 : ends[0]])) if ends else None
    except ValueError as error:
        logger.warning("%s: the licence was not read from its first lines: %s", readme, error)
        return {}
    return values if isinstance(values, dict) else {}


def copy_licence_texts(source: Path, folder: Path) -> list[str]:
    """Copy the files that a licence may ask to be passed on; returns their names."""
    found = sorted({path for pattern in _TEXTS for path in source.glob(pattern) if path.is_file()})
    for path in found:
        shutil.copyfile(inside(source, path.name), folder / path.name)
    return [path.name for path in found]
