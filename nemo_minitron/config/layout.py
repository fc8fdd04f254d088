"""Which layouts and which activation recomputation a model can take. Imports no torch."""

from nemo_minitron.config.axes import split_sizes
from nemo_minitron.config.layers import EXPERTS, MLP, kinds_of
from nemo_minitron.config.model import ModelConfig
from nemo_minitron.config.parallel import ParallelConfig, layers_per_chunk
from nemo_minitron.config.training import RECOMPUTE_KEYS, TrainerConfig


def padded_vocab_size(vocab_size: int, tensor_model_parallel_size: int) -> int:
    """Return the smallest multiple of the tensor-parallel size that holds the vocabulary."""
    tp = tensor_model_parallel_size
    return -(-vocab_size // tp) * tp


def check_layout(config: ModelConfig, parallel: ParallelConfig) -> None:
    """Refuse layouts this model cannot be split into.

    Raises:
        ValueError: names the size, the degree and the keys to change.
    """
    check_experts(config, parallel)
    check_linear(config, parallel)
    tp = parallel.tensor_model_parallel_size
    for name, degree in split_sizes(config).items():
        # Experts are checked above, with the rest of their layout.
        if degree == "tensor_model_parallel_size" and getattr(config, name) % tp:
            raise ValueError(
                f"parallel.tensor_model_parallel_size={tp} must divide {name}="
                f"{getattr(config, name)} of the model; use a divisor of it"
            )
    if tp > config.vocab_size:
        raise ValueError(
            f"parallel.tensor_model_parallel_size={tp} is larger than vocab_size="
            f"{config.vocab_size} of the model; make it smaller"
        )
    check_pipeline(config, parallel)


def check_linear(config: ModelConfig, parallel: ParallelConfig) -> None:
    """Refuse layouts that cannot share out the heads of gated delta nets."""
    if config.linear_attention_freq is None:
        return
    tp, cp = parallel.tensor_model_parallel_size, parallel.context_parallel_size
    heads = config.linear_num_key_heads or 0
    if heads % (tp * cp):
        raise ValueError(
            f"parallel.tensor_model_parallel_size={tp} times parallel.context_parallel_size={cp} "
            f"must divide linear_num_key_heads={heads} of the model, as ranks of both share out "
            "the heads of a gated delta net; make one of them smaller"
        )


def check_writes(config: ModelConfig, what: str) -> None:
    """Refuse models that cannot write token by token.

    Args:
        config: the model.
        what: who writes, for the message.

    Raises:
        ValueError: some of its layers are gated delta nets.
    """
    if config.linear_attention_freq is not None:
        raise ValueError(
            f"{what} text token by token, but a gated delta net of Megatron-Core (family "
            f"'{config.family}') keeps no state from one token to the next; export the model and "
            "let transformers write"
        )


def check_cached(parallel: ParallelConfig, what: str) -> None:
    """Refuse layouts that Megatron's static batching cannot generate with.

    Args:
        parallel: the layout.
        what: who generates, for the message.

    Raises:
        ValueError: names the key and what to set.
    """
    wanted: dict[str, int | None] = {
        "virtual_pipeline_model_parallel_size": None,
        "context_parallel_size": 1,
        "expert_model_parallel_size": 1,
        "sequence_parallel": False,
    }
    for name, value in wanted.items():
        found = getattr(parallel, name)
        if found != value:
            shown = "null" if value is None else str(value).lower()
            raise ValueError(
                f"parallel.{name}={str(found).lower()}: {what} text token by token, which "
                f"Megatron's inference does on tensor, pipeline and data parallel ranks only; set "
                f"parallel.{name}={shown} and, if the model needs more ranks, a larger parallel."
                "tensor_model_parallel_size or pipeline_model_parallel_size"
            )


def check_experts(config: ModelConfig, parallel: ParallelConfig) -> None:
    """Refuse layouts Megatron cannot spread the experts over."""
    ep, experts = parallel.expert_model_parallel_size, config.num_moe_experts
    if experts is None:
        if ep > 1:
            raise ValueError(
                f"parallel.expert_model_parallel_size={ep} needs a model with experts; family "
                f"'{config.family}' has none: set it to 1"
            )
        return
    if experts % ep:
        raise ValueError(
            f"parallel.expert_model_parallel_size={ep} must divide num_moe_experts={experts} of "
            "the model; use a divisor of it"
        )
    if parallel.tensor_model_parallel_size > 1 and not parallel.sequence_parallel:
        raise ValueError(
            f"parallel.tensor_model_parallel_size={parallel.tensor_model_parallel_size} of a model "
            "with experts needs sequence parallelism; set parallel.sequence_parallel=true"
        )


def check_pipeline(config: ModelConfig, parallel: ParallelConfig) -> None:
    """Refuse layer splits Megatron cannot make."""
    layout = parallel.pipeline_model_parallel_layout
    if layout is not None:
        total = sum(layers_per_chunk(layout))
        if total != config.num_layers:
            raise ValueError(
                f"parallel.pipeline_model_parallel_layout={layout} holds {total} layers (t) but "
                f"num_layers={config.num_layers} of the model; make them equal"
            )
        return
    pp = parallel.pipeline_model_parallel_size
    first = parallel.num_layers_in_first_pipeline_stage
    last = parallel.num_layers_in_last_pipeline_stage
    if pp == 1:
        if first or last:
            raise ValueError(
                "parallel.num_layers_in_first/last_pipeline_stage need "
                "parallel.pipeline_model_parallel_size of at least 2"
            )
        return
    rest = config.num_layers - (first or 0) - (last or 0)
    stages = pp - (first is not None) - (last is not None)
    chunks = parallel.virtual_pipeline_model_parallel_size or 1
    even = rest == 0 if stages == 0 else rest > 0 and rest % (stages * chunks) == 0
    if not even or any(size is not None and size % chunks for size in (first, last)):
        raise ValueError(
            f"num_layers={config.num_layers} cannot be split over parallel."
            f"pipeline_model_parallel_size={pp} x virtual_pipeline_model_parallel_size={chunks} "
            f"(first stage {first}, last stage {last}); set parallel."
            "num_layers_in_first_pipeline_stage / num_layers_in_last_pipeline_stage so that the "
            "rest divides evenly"
        )


def layers_of_stages(config: ModelConfig, parallel: ParallelConfig) -> list[list[int]]:
    """Return layers of every model chunk of each pipeline stage, of a layout that fits the model.

    Returns:
        One list per pipeline rank, with one number per virtual stage.
    """
    pp = parallel.pipeline_model_parallel_size
    chunks = parallel.virtual_pipeline_model_parallel_size or 1
    if parallel.pipeline_model_parallel_layout is not None:
        sizes = layers_per_chunk(parallel.pipeline_model_parallel_layout)
        return [sizes[stage::pp] for stage in range(pp)]
    first = parallel.num_layers_in_first_pipeline_stage
    last = parallel.num_layers_in_last_pipeline_stage
    named = [size for size in (first, last) if size is not None]
    inner = pp - len(named)
    each = (config.num_layers - sum(named)) // inner if inner else 0
    stages = [each] * pp
    stages[0] = each if first is None else first
    stages[-1] = stages[-1] if last is None else last
    return [[size // chunks] * chunks for size in stages]


def layers_on_stages(config: ModelConfig, parallel: ParallelConfig) -> list[list[list[int]]]:
    """Return the layers (0-based) of each stage: ``[pipeline rank][virtual stage]``."""
    sizes = layers_of_stages(config, parallel)
    found: list[list[list[int]]] = [[] for _ in sizes]
    start = 0
    for chunk in range(len(sizes[0])):
        for stage, counts in enumerate(sizes):
            found[stage].append(list(range(start, start + counts[chunk])))
            start += counts[chunk]
    return found


def recompute_settings(trainer: TrainerConfig) -> dict[str, object]:
    """Return the keyword arguments of Megatron's ``TransformerConfig``."""
    return {key: getattr(trainer, key) for key in RECOMPUTE_KEYS}


def check_recompute(trainer: TrainerConfig, model: ModelConfig, parallel: ParallelConfig) -> None:
    """Refuse settings that this model, split like this, cannot take.

    Megatron itself accepts some of them and then fails in the first step (``uniform`` runs past
    the last layer of a stage) or recomputes nothing (``mlp`` where there are only experts).

    Raises:
        ValueError: names the key, the model's size and the values that fit.
    """
    kinds = "".join(kinds_of(model))
    for module, kind, other in (("mlp", MLP, "moe"), ("moe", EXPERTS, "mlp")):
        if module in (trainer.recompute_modules or ()) and kind not in kinds:
            has = "are all experts" if kind == MLP else "have no experts"
            raise ValueError(
                f"trainer.recompute_modules names {module}, but the layers of family "
                f"'{model.family}' {has}: use {other}"
            )
    layers = trainer.recompute_num_layers
    chunk = {size for sizes in layers_of_stages(model, parallel) for size in sizes}
    if layers is None:
        return
    if trainer.recompute_method == "block" and layers > max(chunk):
        raise ValueError(
            f"trainer.recompute_num_layers={layers} is more than the {max(chunk)} layers of a "
            "pipeline stage (model chunk); make it smaller"
        )
    if trainer.recompute_method == "uniform" and any(size % layers for size in chunk):
        sizes = ", ".join(map(str, sorted(chunk)))
        raise ValueError(
            f"trainer.recompute_num_layers={layers} must divide the layers of every pipeline stage "
            f"(model chunk), here {sizes}; 1 always does"
        )


def check_prediction(
    model: ModelConfig, parallel: ParallelConfig, trainer: TrainerConfig | None = None
) -> None:
    """Refuse what a model that is built with layers for multi-token prediction cannot take.

    Args:
        model: with or without such layers.
        parallel: its layout.
        trainer: of a model that is trained.

    Raises:
        ValueError: names the key and what fits.
    """
    if model.mtp_num_layers is None:
        return
    if parallel.pipeline_model_parallel_layout is not None:
        raise ValueError(
            f"parallel.pipeline_model_parallel_layout={parallel.pipeline_model_parallel_layout} is "
            f"not supported for a model with mtp_num_layers={model.mtp_num_layers}, whose layers "
            "for multi-token prediction lie on the last stage; use parallel."
            "num_layers_in_last_pipeline_stage to make that one smaller"
        )
    if trainer and trainer.recompute_method == "uniform" and trainer.recompute_num_layers != 1:
        raise ValueError(
            f"trainer.recompute_num_layers={trainer.recompute_num_layers} with recompute_method="
            f"uniform is not supported for a model with mtp_num_layers={model.mtp_num_layers}, "
            "whose layer for multi-token prediction Megatron-Core recomputes alone; set it to 1"
        )
