"""The keys of ``minitron data``."""

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from nemo_minitron.config.base import INPUT, MAY_CHANGE, StageConfig, check_values
from nemo_minitron.config.blend import parse_blend
from nemo_minitron.config.training import DataConfig, check_seed


@dataclass(kw_only=True)
class SourcesConfig:
    """Texts, and how they are read; the keys of ``data`` of other stages mean the same."""

    blend: Any = field(default=MISSING, metadata=INPUT)
    """Weighted sources of text: a list of ``{weight, path}``, weights and paths in turn, or a YAML
    file that holds such a list. Each gets its share of ``total_tokens``."""
    blend_max_epochs: float | None = field(default=None, metadata=MAY_CHANGE)
    """Most times that the share of a source may be what it holds; null only says how often."""
    text_key: str = "text"
    """Key of the text in a record."""
    document_separator: str = "\n\n"
    """What separates documents inside one plain text file."""
    seed: int = 1234
    """Seed of the order of files, and of documents in the pair that they make."""

    def __post_init__(self) -> None:
        """Check values that do not depend on the texts."""
        check_values(self, "data.")
        check_seed(self.seed)
        if self.blend != MISSING:
            self.blend = parse_blend(self.blend)
        if self.blend_max_epochs is not None and not self.blend_max_epochs > 0:
            raise ValueError(f"data.blend_max_epochs={self.blend_max_epochs} must be above 0")

    def as_read(self) -> DataConfig:
        """Return a config for reading the texts: all documents, samples of any length."""
        return DataConfig(
            path="",
            blend=self.blend,
            text_key=self.text_key,
            document_separator=self.document_separator,
            seed=self.seed,
            records="text",
            split="1",
            seq_length=1,
        )


@dataclass(kw_only=True)
class SourcesStageConfig(StageConfig):
    """Weighted texts -> tokens of a budget, as ``data.blend`` and Megatron-LM read them."""

    checkpoint: str = field(default=MISSING, metadata=INPUT)
    """Result folder of the model whose tokenizer gives the ids."""
    total_tokens: int = field(default=MISSING, metadata=MAY_CHANGE)
    """Tokens of all sources together, end-of-document tokens included."""
    data: SourcesConfig = field(default_factory=SourcesConfig)

    def __post_init__(self) -> None:
        """Check ranges."""
        super().__post_init__()
        if self.total_tokens < 1:
            raise ValueError(f"total_tokens={self.total_tokens} must be at least 1")

    def shares(self) -> list[int]:
        """Return the tokens that each source gives."""
        weights = [source["weight"] for source in self.data.blend]
        return [max(round(self.total_tokens * weight / sum(weights)), 1) for weight in weights]
