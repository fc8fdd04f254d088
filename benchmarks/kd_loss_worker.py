"""One row of ``kd_loss.py`` in a process of its own, which imports torch and the one loss.

``python kd_loss_worker.py SIDE VOCAB TOKENS THREADS OUT`` with SIDE ``ours`` or ``modelopt``; OUT
gets the measurements as JSON, and ``OUT.pt`` the gradients.
"""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

STUDENT, TEACHER = 448, 576
TIMED_CALLS = 2
Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def ours() -> Loss:
    """``logit_loss`` with its defaults, in a group of one."""
    import torch.distributed as dist

    from nemo_minitron.distillation.logit_loss import logit_loss
    from nemo_minitron.distillation.loss_config import LogitLossConfig
    from nemo_minitron.distillation.vocab import VocabShard

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    config = LogitLossConfig()

    def loss(hidden: Tensor, weight: Tensor, t_hidden: Tensor, t_weight: Tensor) -> Tensor:
        labels, mask = torch.zeros(len(hidden), dtype=torch.int64), torch.ones(len(hidden))
        shard = VocabShard(dist.group.WORLD, len(weight), len(weight))
        teacher = {"teacher_hidden": t_hidden, "teacher_weight": t_weight}
        total, _ = logit_loss(hidden, weight, labels, mask, config, shard, **teacher)
        return total / len(hidden)

    return loss


def modelopt() -> Loss:
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


def inputs(vocab: int, tokens: int) -> list[Tensor]:
    """Hidden states and output layers whose logits have a spread of a trained model's."""
    generator = torch.Generator().manual_seed(vocab)
    sizes = [(tokens, STUDENT), (vocab, STUDENT), (tokens, TEACHER), (vocab, TEACHER)]
    made = [torch.randn(size, generator=generator) for size in sizes]
    for weight in (made[1], made[3]):
        weight *= 2 / weight.size(1) ** 0.5
    for tensor in made[:2]:
        tensor.requires_grad_()
    return made


def memory(field: str) -> int:
    """Bytes of a line of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith(field + ":")]
    return int(line.split()[1]) * 1024


def call(loss: Loss, tensors: list[Tensor]) -> float:
    """Loss and gradients once."""
    for tensor in tensors:
        tensor.grad = None
    value = loss(*tensors)
    value.backward()
    return value.item()


def measure(loss: Loss, vocab: int, tokens: int) -> tuple[dict[str, float], list[Tensor]]:
    """Peak of the first call, CPU seconds of the fastest of the others."""
    call(loss, inputs(64, 8))  # BLAS and autograd have started when memory is measured
    tensors = inputs(vocab, tokens)
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM = now
    before = memory("VmRSS")
    value = call(loss, tensors)
    weight_grad = tensors[1].numel() * tensors[1].element_size()
    extra = memory("VmHWM") - before - weight_grad
    seconds = []
    for _ in range(TIMED_CALLS):
        start = time.process_time()
        call(loss, tensors)
        seconds.append(time.process_time() - start)
    found = {"loss": value, "extra_bytes": extra, "cpu_seconds": min(seconds)}
    return found, [tensor.grad for tensor in tensors[:2]]


def main() -> None:
    """Measure one side on one shape."""
    side, vocab, tokens, threads, out = sys.argv[1:]
    torch.set_num_threads(int(threads))
    loss = {"ours": ours, "modelopt": modelopt}[side]()
    found, grads = measure(loss, int(vocab), int(tokens))
    torch.save(grads, f"{out}.pt")
    Path(out).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
