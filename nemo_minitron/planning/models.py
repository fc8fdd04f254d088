"""Follow the sizes of the model that every item of a pipeline reads and writes."""

import logging
from pathlib import Path
from typing import Any

from nemo_minitron.config.layers import kinds_of
from nemo_minitron.config.model import MODEL_YAML, ModelConfig
from nemo_minitron.config.stages import ImportConfig, PipelineConfig, PruneConfig, PruningConfig
from nemo_minitron.documents import read_json_object
from nemo_minitron.families.experts import warn_of_expert_sizes
from nemo_minitron.families.letters import in_letters
from nemo_minitron.families.registry import family_of, read_config
from nemo_minitron.pipeline.plan import Item
from nemo_minitron.pruning.targets import check_result, target_sizes

log = logging.getLogger(__name__)

# Keys that name the model an item works on; ``teacher`` comes beside one of them.
_MODEL_KEYS = ("checkpoint", "student")
_SHOWN = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "vocab_size")


def stated_model(cfg: PipelineConfig) -> ModelConfig | None:
    """Return the model that ``model.*`` describes, if it does.

    Raises:
        ValueError: unknown or missing keys, or sizes that no model has.
    """
    if not cfg.model:
        return None
    try:
        model = ModelConfig(**cfg.model)
    except TypeError as error:  # unknown or missing arguments
        known = str(error).replace("ModelConfig.__init__() ", "")
        raise ValueError(f"model: {known}; choose model=<entry of conf/model>") from None
    except ValueError as error:
        raise ValueError(f"model.{error}") from error
    family_of(model)
    return model


def target_model(config: ModelConfig, pruning: PruningConfig) -> ModelConfig:
    """Return sizes of ``config`` after pruning.

    Which layers stay is not known before scores are, unless ``drop_layers`` says so. Where layers
    are of several kinds, as large a share of every kind stands for them.

    Raises:
        ValueError: see ``pruning.targets.check_result``.
    """
    check_result(config, pruning)
    sizes, layers = target_sizes(config, pruning), None
    if pruning.drop_layers is not None:
        dropped = {layer - 1 for layer in pruning.drop_layers}
        layers = [layer for layer in range(config.num_layers) if layer not in dropped]
    elif len({*kinds_of(config)}) > 1 and sizes["num_layers"] < config.num_layers:
        layers = _likely_layers(config, sizes["num_layers"])
    small = config.resized(sizes, layers)
    warn_of_expert_sizes(small)
    return small


def _likely_layers(config: ModelConfig, count: int) -> list[int]:
    """Choose layers so that every kind keeps an equal share, and at least one layer."""
    kinds = kinds_of(config)
    share = [kinds[:at].count(kind) / kinds.count(kind) for at, kind in enumerate(kinds)]
    layers = sorted(sorted(range(len(kinds)), key=share.__getitem__)[:count])
    log.warning(
        "which %d of the layers %s stay follows from scores that are not there yet; %s, a like "
        "share of every kind, is counted (pruning.drop_layers says which)",
        count,
        " ".join(kinds),
        " ".join(kinds[layer] for layer in layers),
    )
    return layers


class Models:
    """Sizes by result folder, filled in the order of the items."""

    def __init__(self, stated: ModelConfig | None) -> None:
        self._stated = stated
        self._known: dict[str, ModelConfig] = {}

    def add(self, item: Item) -> ModelConfig | None:
        """Return sizes of the model an item works on; what it makes of it is remembered.

        Returns:
            None for an item that reads no model.

        Raises:
            ValueError: nobody knows the sizes, or the targets do not fit them.
        """
        cfg: Any = item.config
        if isinstance(cfg, ImportConfig):
            model = self._imported(cfg)
        else:
            # A benchmark names several; what it takes is measured, not planned.
            keys = [key for key in _MODEL_KEYS if isinstance(getattr(cfg, key, None), str)]
            if not keys:
                return None
            model = self.of(keys[0], getattr(cfg, keys[0]))
        made = target_model(model, cfg.pruning) if isinstance(cfg, PruneConfig) else model
        self._known[cfg.output_dir] = made
        return model

    def made_by(self, item: Item) -> ModelConfig:
        """Return the sizes of the model that an item leaves."""
        return self._known[item.config.output_dir]

    def of(self, key: str, folder: str) -> ModelConfig:
        """Return sizes of a result that config key ``key`` names."""
        if folder in self._known:
            return self._known[folder]
        nested = Path(folder) / "checkpoint"
        if (nested / MODEL_YAML).is_file():
            return ModelConfig.load(nested)
        if self._stated is not None and key != "student":
            return self._stated
        raise ValueError(
            f"{key}={folder} does not exist, and its sizes are not known; "
            + (
                "plan the whole pipeline (experiment=...), which says what it is pruned to"
                if key == "student" and self._stated is not None
                else "choose model=<entry of conf/model>, or give a result that is there"
            )
        )

    def _imported(self, cfg: ImportConfig) -> ModelConfig:
        if Path(cfg.source).exists():
            return source_model(cfg)
        if self._stated is None:
            raise ValueError(
                f"source={cfg.source} does not exist, and the sizes of the model are not known; "
                "choose model=<entry of conf/model>, or set source to a model that is there"
            )
        return in_letters(self._stated) if cfg.as_hybrid else self._stated


def source_model(cfg: ImportConfig) -> ModelConfig:
    """Return sizes of the model that ``import`` will read, from its headers."""
    path = Path(cfg.source) / "config.json"
    if path.is_file():
        values = read_json_object(path)
        config = read_config(values, cfg.source_ignore)[1]
    else:
        from nemo_minitron.checkpoint.source import open_source

        opened = open_source(cfg.source, cfg.tokenizer, cfg.vocab_size, cfg.source_ignore)
        config = opened.config
    return in_letters(config) if cfg.as_hybrid else config


def warn_of_another_model(items: list[Item], stated: ModelConfig | None) -> None:
    """Say so when what is imported is not the model the pipeline was set up for."""
    for item in items:
        if stated is None or not isinstance(item.config, ImportConfig):
            continue
        found = source_model(item.config)
        other = [name for name in _SHOWN if getattr(found, name) != getattr(stated, name)]
        if other:
            log.warning(
                "%s: source=%s has %s; the pipeline's sizes, batches and learning rates are for a "
                "model of %s",
                item.name,
                item.config.source,
                ", ".join(f"{name}={getattr(found, name)}" for name in other),
                ", ".join(f"{name}={getattr(stated, name)}" for name in other),
            )
