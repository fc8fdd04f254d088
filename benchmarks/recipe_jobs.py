"""The stages of ``benchmarks.recipe`` for one seed."""

from dataclasses import dataclass
from itertools import product
from pathlib import Path

from benchmarks.stage_graph import Job, fill

_TEACHER = {
    "num_hidden_layers": 8,
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 48,
    "max_position_embeddings": 256,
}
# Random models to make, in transformers' words: the teacher, and one of the width-pruned size.
MODELS = {
    "teacher": _TEACHER,
    "random": {**_TEACHER, "hidden_size": 128, "intermediate_size": 384},
}
WIDTH = ("pruning.target.hidden_size=128", "pruning.target.ffn_hidden_size=384")
HALFWAY = ("pruning.target.hidden_size=160", "pruning.target.ffn_hidden_size=448")
DEPTH = 4
AGGREGATIONS = tuple(product(("l2", "mean", "var"), ("mean", "l2", "var")))
RETRAINED = (("mean", "mean"), ("l2", "l2"))
SEQ_LENGTH, BATCH = 128, 16
TEACHER_LR = 2e-3


@dataclass(frozen=True)
class Settings:
    """How long things take.

    Attributes:
        teacher_steps: of the teacher's training, ``BATCH`` x ``SEQ_LENGTH`` tokens each.
        steps: of every student.
        corrections: of the teacher's correction on new speeches.
        samples: of a calibration.
        held_out: samples of an evaluation.
        written: continuations of every prompt by the teacher.
    """

    teacher_steps: int = 600
    steps: int = 100
    corrections: int = 100
    samples: int = 128
    held_out: int = 64
    written: int = 2

    def describe(self) -> str:
        """Tokens, in words."""
        step = BATCH * SEQ_LENGTH
        return (
            f"teacher {self.teacher_steps * step:,}, correction {self.corrections * step:,}, every "
            f"student {self.steps * step:,}, held out {self.held_out * SEQ_LENGTH:,}"
        )


def aggregation(batch: str, seq: str) -> str:
    """Name of the model pruned by scores of one aggregation; the default has its own."""
    return "width" if (batch, seq) == ("l2", "mean") else f"width_{batch}_{seq}"


@dataclass(frozen=True)
class Seed:
    """Makes the jobs of a seed: names, data and step counts filled in."""

    number: int
    inputs: Path
    settings: Settings

    def job(self, name: str, *line: str, needs: tuple[str, ...] = ()) -> Job:
        """A job whose name and needs are this seed's."""
        prefix = f"seed{self.number}/"
        names = tuple(prefix + need for need in needs)
        qualified = {need: "{" + prefix + need + "}" for need in needs}
        words = [fill(word, qualified) for word in line]
        return Job(prefix + name, tuple(words), names)

    def data(self, text: str) -> tuple[str, ...]:
        """Data keys; ``old`` and ``new`` are folders of inputs, anything else is a path."""
        path = self.inputs / text if text in ("old", "new") else text
        return (
            f"data.path={path}",
            f"data.seq_length={SEQ_LENGTH}",
            f"data.micro_batch_size={BATCH}",
            f"data.global_batch_size={BATCH}",
            f"data.seed={self.number}",
        )

    def train(
        self, name: str, stage: str, models: dict[str, str], text: str, steps: int, lr: float
    ) -> Job:
        """A training stage; ``models`` maps its keys to jobs."""
        needs = tuple(models.values()) + (("written",) if text == "written" else ())
        path = "{written}/data.jsonl" if text == "written" else text
        split = ("data.split='100,0,0'",) if text == "written" else ()
        return self.job(
            name,
            stage,
            *(f"{key}={{{job}}}" for key, job in models.items()),
            *self.data(path),
            *split,
            f"trainer.max_steps={steps}",
            "trainer.limit_val_batches=0",
            "trainer.save_every_n_steps=0",
            f"trainer.seed={self.number}",
            f"optim.lr={lr}",
            f"optim.min_lr={lr / 10}",
            f"optim.lr_warmup_steps={max(1, steps // 10)}",
            needs=needs,
        )

    def kd(
        self,
        name: str,
        student: str,
        *,
        teacher: str = "teacher",
        text: str = "old",
        share: int = 1,
    ) -> Job:
        """Distillation of ``student``; ``share`` divides the steps."""
        models = {"student": student, "teacher": teacher}
        return self.train(
            name, "distill", models, text, self.settings.steps // share, TEACHER_LR / 2
        )

    def ce(self, name: str, student: str, text: str) -> Job:
        """Language-model training of ``student``, as long and as fast as distillation."""
        models, steps = {"checkpoint": student}, self.settings.steps
        return self.train(name, "finetune", models, text, steps, TEACHER_LR / 2)

    def loss(self, name: str, checkpoint: str, text: str = "old") -> Job:
        """Evaluation on held-out text."""
        return self.job(
            f"loss_{name}",
            "evaluate",
            f"checkpoint={{{checkpoint}}}",
            *self.data(text),
            "data.split_name=test",
            f"data.num_samples={self.settings.held_out}",
            needs=(checkpoint,),
        )

    def scores(self, name: str, checkpoint: str, *keys: str) -> Job:
        """Calibration."""
        return self.job(
            name,
            "importance",
            f"checkpoint={{{checkpoint}}}",
            *self.data("old"),
            f"data.num_samples={self.settings.samples}",
            *keys,
            needs=(checkpoint,),
        )

    def prune(self, name: str, checkpoint: str, scores: str, *keys: str) -> Job:
        """Pruning."""
        keys = (f"checkpoint={{{checkpoint}}}", f"importance={{{scores}}}", *keys)
        return self.job(name, "prune", *keys, needs=(checkpoint, scores))


def seed_jobs(number: int, inputs: Path, settings: Settings) -> list[Job]:
    """All jobs of one seed, in an order in which they could run."""
    seed = Seed(number, inputs, settings)
    return [
        *_teacher(seed),
        *_width(seed),
        *_aggregations(seed),
        *_depth(seed),
        *_two_stages(seed),
        *_shifted(seed),
        *_synthetic(seed),
    ]


def _teacher(seed: Seed) -> list[Job]:
    source = seed.inputs / str(seed.number)
    blocks = (
        "scores.layer_criteria=[block_lm_loss,lm_loss]",
        f"scores.block_sizes=[{_TEACHER['num_hidden_layers'] - DEPTH}]",
    )
    teacher = {"checkpoint": "start"}
    return [
        seed.job("start", "import", f"source={source / 'teacher'}"),
        seed.train("teacher", "finetune", teacher, "old", seed.settings.teacher_steps, TEACHER_LR),
        seed.loss("teacher", "teacher"),
        seed.scores("scores", "teacher", *blocks),
        seed.job("random", "import", f"source={source / 'random'}"),
    ]


def _width(seed: Seed) -> list[Job]:
    return [
        seed.prune("width", "teacher", "scores", *WIDTH),
        seed.loss("width", "width"),
        seed.kd("width_kd", "width"),
        seed.loss("width_kd", "width_kd"),
        seed.ce("width_ce", "width", "old"),
        seed.loss("width_ce", "width_ce"),
        seed.kd("random_kd", "random"),
        seed.loss("random_kd", "random_kd"),
    ]


def _aggregations(seed: Seed) -> list[Job]:
    jobs = []
    for batch, seq in AGGREGATIONS[1:]:  # the first is the default
        name, scores = aggregation(batch, seq), f"scores_{batch}_{seq}"
        keys = (f"scores.batch_aggregation={batch}", f"scores.seq_aggregation={seq}")
        jobs.append(seed.scores(scores, "teacher", "scores.axes=[hidden,ffn]", *keys))
        jobs.append(seed.prune(name, "teacher", scores, *WIDTH))
        jobs.append(seed.loss(name, name))
        if (batch, seq) in RETRAINED:
            jobs.append(seed.kd(f"{batch}_{seq}_kd", name))
            jobs.append(seed.loss(f"{batch}_{seq}_kd", f"{batch}_{seq}_kd"))
    return jobs


def _depth(seed: Seed) -> list[Job]:
    jobs = []
    for name, criterion in (("depth", "block_lm_loss"), ("scattered", "lm_loss")):
        keys = (f"pruning.target.num_layers={DEPTH}", f"pruning.layer_criterion={criterion}")
        jobs.append(seed.prune(name, "teacher", "scores", *keys))
        jobs.append(seed.loss(name, name))
        jobs.append(seed.kd(f"{name}_kd", name))
        jobs.append(seed.loss(f"{name}_kd", f"{name}_kd"))
    return jobs


def _two_stages(seed: Seed) -> list[Job]:
    """As many tokens as the other students, half of them between the cuts."""
    return [
        seed.prune("stage1", "teacher", "scores", *HALFWAY),
        seed.kd("stage1_kd", "stage1", share=2),
        seed.scores("stage1_scores", "stage1_kd", "scores.axes=[hidden,ffn]"),
        seed.prune("stage2", "stage1_kd", "stage1_scores", *WIDTH),
        seed.loss("stage2", "stage2"),
        seed.kd("stage2_kd", "stage2", share=2),
        seed.loss("stage2_kd", "stage2_kd"),
    ]


def _shifted(seed: Seed) -> list[Job]:
    """New speeches, which the teacher has never seen, and a teacher that has."""
    return [
        seed.loss("new_teacher", "teacher", "new"),
        seed.train(
            "corrected",
            "finetune",
            {"checkpoint": "teacher"},
            "new",
            seed.settings.corrections,
            TEACHER_LR / 5,
        ),
        seed.loss("new_corrected_teacher", "corrected", "new"),
        seed.kd("new_kd", "width", text="new"),
        seed.loss("new_kd", "new_kd", "new"),
        seed.kd("new_corrected", "width", teacher="corrected", text="new"),
        seed.loss("new_corrected", "new_corrected", "new"),
        seed.ce("new_ce", "width", "new"),
        seed.loss("new_ce", "new_ce", "new"),
    ]


def _synthetic(seed: Seed) -> list[Job]:
    """The other style of distillation: language modelling on what the teacher writes."""
    return [
        seed.job(
            "written",
            "generate",
            "checkpoint={teacher}",
            f"prompts={seed.inputs / 'prompts.txt'}",
            f"samples_per_prompt={seed.settings.written}",
            "sampling.max_new_tokens=112",
            "sampling.top_p=1.0",
            f"sampling.seed={seed.number}",
            "batch_size=64",
            "save_every_n_samples=512",
            needs=("teacher",),
        ),
        seed.ce("width_sdg", "width", "written"),
        seed.loss("width_sdg", "width_sdg"),
    ]
