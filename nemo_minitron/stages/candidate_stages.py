"""The stages that a candidate of ``search`` goes through, as configs. Imports no torch."""

from dataclasses import replace

from nemo_minitron.config.balance import balanced_layout
from nemo_minitron.config.model import ModelConfig
from nemo_minitron.config.parallel import TeacherParallelConfig
from nemo_minitron.config.stages import DistillConfig, PruningConfig, SearchConfig, TargetConfig
from nemo_minitron.config.training import DataConfig, OptimConfig, TrainerConfig
from nemo_minitron.search import Candidate


def pruning_of(cfg: SearchConfig, config: ModelConfig, one: Candidate) -> PruningConfig:
    """Return the config with which ``prune`` makes a candidate."""
    changed = {name: size for name, size in one.sizes.items() if size != getattr(config, name)}
    default = PruningConfig.layer_criterion
    criterion = cfg.layer_criterion if "num_layers" in changed else default
    return PruningConfig(target=TargetConfig(**changed), layer_criterion=criterion)


def training_data(cfg: SearchConfig) -> DataConfig:
    """Return the data that candidates are distilled on: the other splits of ``data``."""
    return replace(cfg.data, num_samples=None)


def distill_config(cfg: SearchConfig, config: ModelConfig, small: ModelConfig) -> DistillConfig:
    """Return the ``distill`` stage that a candidate goes through."""
    short, whole = cfg.search.distill, cfg.parallel
    teacher = TeacherParallelConfig(
        num_layers_in_first_pipeline_stage=whole.num_layers_in_first_pipeline_stage,
        num_layers_in_last_pipeline_stage=whole.num_layers_in_last_pipeline_stage,
        pipeline_model_parallel_layout=whole.pipeline_model_parallel_layout,
    )
    return DistillConfig(
        output_dir=cfg.output_dir,
        student=cfg.checkpoint,
        teacher=cfg.checkpoint,
        data=training_data(cfg),
        parallel=balanced_layout(config, small, whole),
        teacher_parallel=teacher,
        trainer=TrainerConfig(
            max_steps=short.steps,
            limit_val_batches=0,
            precision=short.precision,
            save_every_n_steps=short.save_every_n_steps,
            save_top_k=1,
            seed=cfg.data.seed,
        ),
        megatron=cfg.megatron,
        optim=OptimConfig(lr=short.lr, min_lr=short.min_lr, lr_warmup_steps=short.lr_warmup_steps),
    )
