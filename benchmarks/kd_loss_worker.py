"""One row of ``kd_loss.py`` in a process of its own, which imports torch and the one loss.

``python kd_loss_worker.py SIDE VOCAB TOKENS OUT`` with SIDE ``ours``, ``plain`` (torch alone) or
``modelopt``; OUT gets the measurements as JSON, one for each of ``--chunks``, and ``OUT.pt`` the
gradients of the first. Where there is CUDA it runs there.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

STUDENT, TEACHER = 448, 576
TIMED_CALLS = 2
Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def ours(chunk_size: int | None) -> Loss:
    """``logit_loss`` with its defaults, in a group of one."""
    import torch.distributed as dist

    from nemo_minitron.config.distillation import DistillationConfig
    from nemo_minitron.distillation.logit_loss import TeacherStates, logit_loss
    from nemo_minitron.distillation.vocab import VocabShard

    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    config = (
        DistillationConfig() if chunk_size is None else DistillationConfig(chunk_size=chunk_size)
    )

    def loss(hidden: Tensor, weight: Tensor, t_hidden: Tensor, t_weight: Tensor) -> Tensor:
        labels = torch.zeros(len(hidden), dtype=torch.int64, device=DEVICE)
        mask = torch.ones(len(hidden), device=DEVICE)
        assert dist.group.WORLD is not None, "the worker has initialised it"
        shard = VocabShard(dist.group.WORLD, len(weight), len(weight))
        teacher = TeacherStates(t_hidden, t_weight)
        total, _ = logit_loss(hidden, weight, labels, mask, config, shard, teacher)
        return total / len(hidden)

    return loss


def plain(_: int | None) -> Loss:
    """Torch's own functions on whole logits."""

    def loss(hidden: Tensor, weight: Tensor, t_hidden: Tensor, t_weight: Tensor) -> Tensor:
        student = (hidden @ weight.t()).float().log_softmax(-1)
        with torch.no_grad():
            teacher = (t_hidden @ t_weight.t()).float().log_softmax(-1)
        kl_div = torch.nn.functional.kl_div
        return kl_div(student, teacher, reduction="batchmean", log_target=True)

    return loss


def modelopt(_: int | None) -> Loss:
    """ModelOpt's ``LogitsKLLoss`` on whole logits, as its distillation plugin calls it."""
    from types import SimpleNamespace

    from modelopt.torch.distill.plugins.megatron import LogitsKLLoss

    config = SimpleNamespace(tensor_model_parallel_size=1, sequence_parallel=False)
    kl = LogitsKLLoss(config)

    def loss(hidden: Tensor, weight: Tensor, t_hidden: Tensor, t_weight: Tensor) -> Tensor:
        student = (hidden @ weight.t())[:, None]  # [s, b, v]
        with torch.no_grad():
            teacher = (t_hidden @ t_weight.t())[:, None]
        per_token, *_ = kl(student, teacher)
        return per_token.mean()

    return loss


def inputs(vocab: int, tokens: int, widths: tuple[int, int], dtype: torch.dtype) -> list[Tensor]:
    """Hidden states and output layers whose logits have a spread of a trained model's."""
    generator = torch.Generator().manual_seed(vocab)
    student, teacher = widths
    sizes = [(tokens, student), (vocab, student), (tokens, teacher), (vocab, teacher)]
    made = [torch.randn(size, generator=generator) for size in sizes]
    for weight in (made[1], made[3]):
        weight *= 2 / weight.size(1) ** 0.5
    made = [tensor.to(DEVICE, dtype) for tensor in made]
    for tensor in made[:2]:
        tensor.requires_grad_()
    return made


def memory(field: str) -> int:
    """Bytes of a line of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith(field + ":")]
    return int(line.split()[1]) * 1024


def call(loss: Loss, tensors: list[Tensor]) -> float:
    """Loss and gradients once; the value is there when the device is done."""
    for tensor in tensors:
        tensor.grad = None
    value = loss(*tensors)
    value.backward()
    return value.item()


def peak(work: Callable[[], float]) -> tuple[float, int]:
    """What a call returns, and its peak of memory above what was in use."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        return work(), torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM = now
    before = memory("VmRSS")
    return work(), memory("VmHWM") - before


def clock() -> float:
    """CPU seconds of this process, or the time when a GPU has done what it was given."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def measure(loss: Loss, tensors: list[Tensor], calls: int) -> dict[str, float]:
    """Peak of the first call; seconds of the fastest of the others and their median."""
    for tensor in tensors:
        tensor.grad = None
    value, extra = peak(lambda: call(loss, tensors))
    weight_grad = tensors[1].numel() * tensors[1].element_size()
    seconds = []
    for _ in range(calls):
        start = clock()
        call(loss, tensors)
        seconds.append(clock() - start)
    times = {"seconds": min(seconds), "median_seconds": statistics.median(seconds)}
    return {"loss": value, "extra_bytes": extra - weight_grad, **times}


def parse() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("side", choices=SIDES)
    parser.add_argument("vocab", type=int)
    parser.add_argument("tokens", type=int)
    parser.add_argument("out")
    parser.add_argument("--threads", type=int, help="None: torch's choice")
    parser.add_argument("--widths", type=int, nargs=2, default=(STUDENT, TEACHER))
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--chunks", type=int, nargs="+", default=[None])
    parser.add_argument("--calls", type=int, default=TIMED_CALLS)
    parser.add_argument("--every", type=int, default=1, help="row of the weight's gradient to keep")
    return parser.parse_args()


SIDES = {"ours": ours, "plain": plain, "modelopt": modelopt}


def main() -> None:
    """Measure one side on one shape."""
    args = parse()
    if args.threads:
        torch.set_num_threads(args.threads)
    widths, dtype = tuple(args.widths), getattr(torch, args.dtype)
    small = inputs(64, 8, widths, dtype)
    found = []
    for index, chunk in enumerate(args.chunks):
        loss = SIDES[args.side](chunk)
        call(loss, small)  # BLAS and autograd have started when memory is measured
        if index == 0:
            tensors = inputs(args.vocab, args.tokens, widths, dtype)
        found.append(measure(loss, tensors, args.calls))
        if index == 0:
            hidden, weight = (tensor.grad for tensor in tensors[:2])
            assert hidden is not None
            assert weight is not None
            torch.save([hidden.cpu(), weight[:: args.every].cpu()], f"{args.out}.pt")
    Path(args.out).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
