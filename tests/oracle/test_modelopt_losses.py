"""Against ModelOpt's logit losses at TP 1 and 2, in fp32.

Forward KL agrees in value and gradient. So does top-k at TP 1; at TP 2 the gradients of ModelOpt's
``TopKLogitsKLLoss`` are twice what they are at TP 1, and ours are not.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from nemo_minitron.config.distillation import DistillationConfig
from tests.cases.loss import run_loss
from tests.helpers.losses import problem
from tests.oracle.environment import OracleUnavailableError, run_oracle

pytestmark = pytest.mark.timeout(600)

VOCAB, TP, TEMPERATURE, TOP_K = 96, (1, 2), 2.0, 7
KEYS: dict[str, dict[str, Any]] = {"forward_kl": {}, "top_k": {"top_k": TOP_K}}
Found = dict[tuple[str, int], list[Tensor]]


def inputs() -> dict[str, Tensor]:
    return {name: x if name == "labels" else x.float() for name, x in problem(VOCAB).items()}


@pytest.fixture(scope="module")
def peer(tmp_path_factory) -> Found:
    """``(kind, tp)`` -> loss and gradients of hidden state and weight of ModelOpt."""
    folder = tmp_path_factory.mktemp("losses")
    save_file(inputs(), folder / "inputs.safetensors")
    job = {"tp": TP, "temperature": TEMPERATURE, "top_k": TOP_K}
    try:
        run_oracle(job, folder, timeout=500, script=Path(__file__).with_name("modelopt_losses.py"))
    except OracleUnavailableError as error:
        pytest.skip(str(error))
    found = {}
    for kind in KEYS:
        for tp in TP:
            ranks = [load_file(folder / f"{kind}.{tp}.{rank}.safetensors") for rank in range(tp)]
            hidden = torch.stack([rank["hidden"] for rank in ranks]).sum(0)
            weight = torch.cat([rank["weight"] for rank in ranks])
            found[kind, tp] = [ranks[0]["loss"], hidden, weight]
    return found


@pytest.fixture(scope="module")
def ours(ranks) -> Found:
    """The same of this package."""
    found = {}
    for kind, keys in KEYS.items():
        config = DistillationConfig(loss=kind, temperature=TEMPERATURE, chunk_size=9, **keys)
        for tp in TP:
            by_rank = ranks.run(tp, run_loss, inputs(), VOCAB, config)
            # ``run_loss`` differentiates half the loss.
            weight = torch.cat([gradients[2] for gradients in by_rank]) * 2
            found[kind, tp] = [by_rank[0][0][0], by_rank[0][1] * 2, weight]
    return found


def assert_same(got: list[Tensor], want: list[Tensor]) -> None:
    for g, w in zip(got, want, strict=True):
        assert (g - w).norm() / w.norm() < 1e-5


@pytest.mark.parametrize("tp", TP)
def test_forward_kl(peer: Found, ours: Found, tp: int) -> None:
    assert_same(ours["forward_kl", tp], peer["forward_kl", tp])


def test_top_k_gradients(peer: Found, ours: Found) -> None:
    """One loss, one gradient at both sizes; the peer's gradients double at TP 2."""
    loss, *gradients = peer["top_k", 1]
    for tp in TP:
        assert_same(ours["top_k", tp], [loss, *gradients])
    assert_same(peer["top_k", 2], [loss, *(2 * gradient for gradient in gradients)])
