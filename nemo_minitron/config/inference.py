"""Config of the stages that run a finished model: evaluation, generation, measurements."""

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from nemo_minitron.config.base import ADDED, INPUT, MAY_CHANGE, NEUTRAL, StageConfig
from nemo_minitron.config.megatron import ForwardMegatronConfig
from nemo_minitron.config.parallel import ParallelConfig
from nemo_minitron.config.training import PRECISION, OptionalDataConfig


@dataclass(kw_only=True)
class LmEvalConfig:
    """How lm-eval runs its tasks; the keys have lm-eval's own names."""

    num_fewshot: int | None = None
    """Examples before each question; null: as many as the task says."""
    limit: int | None = None
    """Documents of each task, the first ones; null: all."""
    batch_size: int = 8
    """Requests of one forward pass on one data-parallel rank."""
    max_length: int | None = None
    """Tokens of the longest request; longer ones lose their beginning, as lm-eval has it. null:
    ``max_position_embeddings`` of the model."""
    bootstrap_iters: int = 1000
    """Resamplings for the standard errors that have no formula; 0: no standard errors at all."""

    def __post_init__(self) -> None:
        """Check ranges."""
        least = {"num_fewshot": 0, "limit": 1, "batch_size": 1, "max_length": 2}
        for name, value in {**least, "bootstrap_iters": 0}.items():
            found = getattr(self, name)
            if found is not None and found < value:
                raise ValueError(f"lm_eval.{name}={found} must be at least {value}")


@dataclass(kw_only=True)
class EvaluateConfig(StageConfig):
    """Loss on held-out data, tasks of lm-eval, and how the model goes on with a text."""

    checkpoint: str = field(default=MISSING, metadata=INPUT)
    """Result folder that holds the model; for ``tasks`` also one of ``export``."""
    data: OptionalDataConfig = field(default_factory=lambda: OptionalDataConfig(split_name="test"))
    tasks: list[str] = field(default_factory=list)
    """Tasks, groups or tags of lm-eval (``pip install nemo_minitron[eval]``)."""
    tasks_path: str | None = field(default=None, metadata=INPUT)
    """Folder of task files (YAML) beside those that lm-eval brings."""
    lm_eval: LmEvalConfig = field(default_factory=LmEvalConfig)
    sample_prompts: list[str] = field(default_factory=list, metadata=ADDED)
    """Beginnings of texts. The model goes on with its most likely tokens, and the report shows what
    it wrote."""
    sample_tokens: int = field(default=40, metadata=ADDED)
    """Most tokens with which the model continues each of ``sample_prompts``."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    megatron: ForwardMegatronConfig = field(default_factory=ForwardMegatronConfig)

    def __post_init__(self) -> None:
        """Check ranges."""
        super().__post_init__()
        if self.sample_tokens < 1:
            raise ValueError(f"sample_tokens={self.sample_tokens} must be at least 1")
        if not all(self.sample_prompts):
            raise ValueError(
                f"sample_prompts={self.sample_prompts} holds an empty text; take it out"
            )


@dataclass(kw_only=True)
class SamplingConfig:
    """How the next token is drawn from the model's distribution."""

    max_new_tokens: int = 256
    """Most tokens that are written after a prompt."""
    temperature: float = 1.0
    """Divides the logits; 0 always takes the most likely token."""
    top_p: float = 0.95
    """Draw from the smallest set of tokens with this probability (1904.09751); 1: from all."""
    seed: int = 1234
    """Seed. With a sample's number it fixes the random numbers, whatever the layout and batch."""

    def __post_init__(self) -> None:
        """Check ranges."""
        if self.max_new_tokens < 1:
            raise ValueError(f"sampling.max_new_tokens={self.max_new_tokens} must be at least 1")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(
                f"sampling.temperature={self.temperature} must be a number from 0 (greedy) upwards"
            )
        if not 0 < self.top_p <= 1:
            raise ValueError(
                f"sampling.top_p={self.top_p} must be above 0 and at most 1 (draws from all tokens)"
            )


@dataclass(kw_only=True)
class FilterConfig:
    """Which of the continuations that the model wrote are kept."""

    min_tokens: int = 16
    """Fewest new tokens of a continuation that is kept."""
    ended: bool = False
    """Whether to keep only texts that end within sampling.max_new_tokens."""
    max_repetition: float = 0.3
    """Largest share of word n-grams that occurred before in the same continuation; 1: any."""
    ngram: int = 4
    """Words of an n-gram, for max_repetition and for near_duplicates."""
    near_duplicates: float = 0.8
    """Drop a text whose set of n-grams is this similar (Jaccard) to that of one kept before; 1
    drops equal texts alone."""

    def __post_init__(self) -> None:
        """Check ranges."""
        if self.min_tokens < 0:
            raise ValueError(f"filters.min_tokens={self.min_tokens} must not be negative")
        if self.ngram < 1:
            raise ValueError(f"filters.ngram={self.ngram} must be at least 1")
        if not 0 <= self.max_repetition <= 1:
            raise ValueError(
                f"filters.max_repetition={self.max_repetition} must be between 0 and 1 (any)"
            )
        if not 0 < self.near_duplicates <= 1:
            raise ValueError(
                f"filters.near_duplicates={self.near_duplicates} must be above 0 and at most 1"
            )


@dataclass(kw_only=True)
class GenerateConfig(StageConfig):
    """Text that a model writes, filtered and without duplicates: data for ``finetune``."""

    checkpoint: str = field(default=MISSING, metadata=INPUT)
    """Result folder that holds the model."""
    prompts: str = field(default=MISSING, metadata=INPUT)
    """A .txt file with one prompt per line, or a .jsonl file."""
    prompt_key: str = "prompt"
    """Key of the prompt in a JSONL record: text, or with ``chat_template`` also a list of messages
    (``role``, ``content``)."""
    samples_per_prompt: int = 1
    """Number of continuations that are written for each prompt."""
    chat_template: bool = False
    """Put every prompt into the tokenizer's chat template, as what the user says."""
    keep_prompt: bool = field(default=True, metadata=MAY_CHANGE)
    """Whether ``text`` starts with the prompt; false: it is the continuation alone."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    filters: FilterConfig = field(default_factory=FilterConfig, metadata=MAY_CHANGE)
    batch_size: int = field(default=8, metadata=MAY_CHANGE)
    """Prompts that are continued together on one data-parallel rank."""
    precision: str = field(default="32", metadata=PRECISION)
    """Precision of the forward passes: ``32`` or ``bf16-mixed``."""
    save_every_n_samples: int = field(default=64, metadata=NEUTRAL)
    """Samples of a data-parallel rank between two saves, from which a killed run goes on."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig, metadata=MAY_CHANGE)
    megatron: ForwardMegatronConfig = field(default_factory=ForwardMegatronConfig)

    def __post_init__(self) -> None:
        """Check ranges."""
        super().__post_init__()
        for name in ("samples_per_prompt", "batch_size", "save_every_n_samples"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")


@dataclass(kw_only=True)
class BenchmarkConfig(StageConfig):
    """Prefill and decode speed, latency and memory of one model or several."""

    checkpoint: Any = field(default=MISSING, metadata=INPUT)
    """Result folder that holds a model, or a list of them (the teacher first)."""
    prompt_length: int = 512
    """Tokens of every prompt."""
    new_tokens: int = 64
    """Tokens after each prompt: the first comes out of the prefill, the others are decoded."""
    batch_size: int = 1
    """Sequences that go together on each data-parallel rank, the same for every model."""
    memory_limit_gb: float | None = None
    """Memory of a rank (GB) that the largest batch fits into. null: that of the GPU; on a CPU no
    largest batch is measured then."""
    max_batch_size: int = 256
    """Largest batch that is tried."""
    rounds: int = 5
    """Measurements of every model, after one that does not count; the models take turns."""
    precision: str = field(default="32", metadata=PRECISION)
    """Precision of weights and cache: ``32`` or ``bf16-mixed``."""
    seed: int = 1234
    """Seed of the random prompts."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    megatron: ForwardMegatronConfig = field(default_factory=ForwardMegatronConfig)

    def __post_init__(self) -> None:
        """Check ranges."""
        super().__post_init__()
        self.checkpoint = [self.checkpoint] if isinstance(self.checkpoint, str) else self.checkpoint
        paths = self.checkpoint
        if not isinstance(paths, list) or not paths or not all(isinstance(p, str) for p in paths):
            raise ValueError(f"checkpoint={paths} must be a result folder or a list of some")
        if len(set(paths)) < len(paths):
            raise ValueError(f"checkpoint={paths} names a model twice; leave one out")
        least = {"prompt_length": 1, "new_tokens": 2, "batch_size": 1, "rounds": 1}
        for name, value in least.items():
            if getattr(self, name) < value:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {value}")
        if self.max_batch_size < self.batch_size:
            raise ValueError(
                f"max_batch_size={self.max_batch_size} must be at least batch_size="
                f"{self.batch_size}"
            )
        if self.memory_limit_gb is not None and not 0 < self.memory_limit_gb < float("inf"):
            raise ValueError(f"memory_limit_gb={self.memory_limit_gb} must be above 0, or null")
