"""``.nemo`` archives of MinitronGPTModel: written at one layout, restored at any.

An archive is an uncompressed tar of ``model_config.yaml``, the tokenizer's files as NeMo artifacts
and ``model_weights/``, a ``torch_dist`` checkpoint, as NeMo's archives of Megatron models are.
NeMo's own connector would keep the weights of the first rank alone, and does not know the class.
"""

import os
import shutil
import socket
import tarfile
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from nemo.core.classes import ModelPT
from nemo.core.connectors.save_restore_connector import SaveRestoreConnector
from omegaconf import DictConfig, OmegaConf, open_dict

from nemo_minitron.checkpoint.parts import archive_parts
from nemo_minitron.config.load import read_section
from nemo_minitron.config.model import ModelConfig
from nemo_minitron.config.parallel import ParallelConfig
from nemo_minitron.config.stages import FinetuneConfig
from nemo_minitron.config.training import DataConfig, OptimConfig, TrainerConfig
from nemo_minitron.documents import yaml_value
from nemo_minitron.models.weights import load_weights
from nemo_minitron.runtime.agreement import from_first, together
from nemo_minitron.runtime.groups import initialised_degrees
from nemo_minitron.runtime.worlds import barrier

WEIGHTS = "model_weights"


def result_config(result: Path, parallel: ParallelConfig) -> DictConfig:
    """Return the config of a MinitronGPTModel with the sizes and the tokenizer of a result folder.

    Training settings are defaults; give the model others before it is trained.

    Args:
        result: result folder of a stage.
        parallel: the initialised layout.
    """
    checkpoint = result / "checkpoint"
    tokenizer = sorted(p for p in (checkpoint / "tokenizer").glob("*") if p.is_file())
    return OmegaConf.create(
        {
            "gpt": asdict(ModelConfig.load(checkpoint)),
            "parallel": asdict(parallel),
            "data": asdict(DataConfig(path="-")),
            "trainer": asdict(TrainerConfig()),
            "optim": asdict(OptimConfig()),
            "chunk_size": FinetuneConfig.chunk_size,
            "tokenizer": {path.name.replace(".", "_"): str(path) for path in tokenizer},
        }
    )


def _check_space(folder: Path, needed: int, path: Path) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ValueError(
            f"{path} needs {needed / 1e9:.1f} GB in {folder}, which has {free / 1e9:.1f} GB free; "
            "set TMPDIR to a folder with more"
        )


def _own_name() -> str:
    """Return a name that no other run has."""
    return uuid.uuid4().hex


@contextmanager
def _unpacked(path: Path) -> Iterator[Path]:
    """The archive in a temporary folder of this node, unpacked by its first rank."""
    root, own = Path(tempfile.gettempdir()), from_first(_own_name)
    folder = root / f"nemo_minitron-{own}-{socket.gethostname()}"
    first = int(os.environ.get("LOCAL_RANK", "0")) == 0
    try:
        together(partial(_unpack, path, folder) if first else None)
        yield folder
        barrier()
    finally:
        if first:
            shutil.rmtree(folder, ignore_errors=True)


def _make_empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _unpack(path: Path, folder: Path) -> None:
    parts = archive_parts(path)
    _check_space(folder.parent, sum(part.size for part in parts.values()), path)
    folder.mkdir()
    with tarfile.open(path, "r:") as tar:
        tar.extractall(folder, filter="data")


def _layout(stored: ParallelConfig, config: ModelConfig) -> ParallelConfig:
    """Return the layout of the running ranks: the stored one if its degrees are theirs."""
    degrees: dict[str, Any] = initialised_degrees()
    if all(getattr(stored, name) == value for name, value in degrees.items()):
        return stored
    split = degrees["tensor_model_parallel_size"] > 1
    sequence = split and (stored.sequence_parallel or config.num_moe_experts is not None)
    return ParallelConfig(**degrees, sequence_parallel=sequence)


class NemoFileConnector(SaveRestoreConnector):
    """Saves and restores MinitronGPTModel at any layout; both are calls of every rank."""

    def save_to(self, model: ModelPT, save_path: str) -> None:
        """Write an archive; it appears complete or not at all.

        Raises:
            ValueError: the weights are not finite.
            OSError: the folder cannot be written (disk full).
        """
        target = Path(save_path)
        work = target.with_name(f".{target.name}.{from_first(_own_name)}.partial")
        first = dist.get_rank() == 0
        together(partial(_make_empty, work) if first else None)
        try:
            model.save(work / WEIGHTS)
            together(partial(self._pack, model, work, target) if first else None)
        finally:
            if first:
                shutil.rmtree(work, ignore_errors=True)

    def _pack(self, model: ModelPT, work: Path, target: Path) -> None:
        config = work / self.model_config_yaml
        model.to_config_file(path2yaml_file=str(config))
        if model.has_native_or_submodules_artifacts():
            self._handle_artifacts(model, nemo_file_folder=str(work))
            self._update_artifact_paths(model, path2yaml_file=str(config))
        archive = work / "archive"
        with tarfile.open(archive, "w:") as tar:
            for path in sorted(work.iterdir()):
                if path != archive:
                    tar.add(path, arcname=f"./{path.name}")
        archive.replace(target)

    def restore_from(
        self,
        calling_cls: type[ModelPT],
        restore_path: str,
        override_config_path: str | DictConfig | None = None,
        map_location: torch.device | None = None,
        strict: bool = True,
        return_config: bool = False,
        trainer: Trainer | None = None,
        validate_access_integrity: bool = True,
    ) -> Any:
        """Rebuild a model from an archive, at the layout of the running ranks.

        Args:
            calling_cls: class of the model.
            restore_path: the archive.
            override_config_path: config to build it with instead: a YAML file or a DictConfig.
            map_location: device; None takes this rank's.
            strict: must be true: all weights are there.
            return_config: return the config alone; needs no process groups.
            trainer: given to the model.
            validate_access_integrity: not used here; ranks read what they need.

        Raises:
            ValueError: the archive is damaged, of another model, or does not fit the layout.
        """
        path = Path(restore_path)
        config = _read_config(path, self.model_config_yaml, override_config_path)
        if return_config:
            return config
        if not strict:
            raise ValueError("strict=False is not supported: an archive holds all weights")
        stored = read_section(ParallelConfig, config.parallel)
        gpt = read_section(ModelConfig, config.gpt)
        with open_dict(config):
            config.pop("target", None)
            config.parallel = asdict(_layout(stored, gpt))
            config.setdefault("chunk_size", FinetuneConfig.chunk_size)
        with _unpacked(path) as folder:
            calling_cls._set_model_restore_state(is_being_restored=True, folder=str(folder))
            try:
                model = calling_cls(cfg=config, trainer=trainer)
                load_weights(model.chunks, model.groups, folder / WEIGHTS, key="restore_path")
            finally:
                calling_cls._set_model_restore_state(is_being_restored=False)
        return model if map_location is None else model.to(map_location)


def _read_config(path: Path, name: str, override: str | DictConfig | None) -> DictConfig:
    if override is not None:
        loaded = override if isinstance(override, DictConfig) else OmegaConf.load(override)
    else:
        part = archive_parts(path).get(name)
        if part is None:
            raise ValueError(f"{path} holds no {name}: it is not a .nemo archive")
        values = yaml_value(part.read())
        if "${" in str(values):  # this package writes none; a stranger's could read the environment
            raise ValueError(f"{path}: {name} must hold values, but it refers to others with ${{}}")
        loaded = OmegaConf.create(values)
    found: Any = OmegaConf.to_container(loaded, resolve=True)
    found = found.get("model", found) if isinstance(found, dict) else {}
    if "gpt" not in found:
        raise ValueError(
            f"{path} is an archive of {found.get('target', 'another class')}, not of "
            "MinitronGPTModel; minitron import opens archives of NeMo 1's GPT models"
        )
    return OmegaConf.create(found)
