"""Least squares against torch.linalg.lstsq on the activations themselves; changed tensors."""

from dataclasses import replace

import pytest
import torch

from nemo_minitron.checkpoint.lazy import from_tensor
from nemo_minitron.config.model import ModelConfig
from nemo_minitron.config.stages import PruningConfig, TargetConfig
from nemo_minitron.families.gemma import GEMMA2 as GEMMA
from nemo_minitron.families.llama import LLAMA as FAMILY
from nemo_minitron.pruning.compensate import (
    Compensation,
    column_map,
    norm_factor,
)
from nemo_minitron.pruning.plan import Plan, full_plan
from nemo_minitron.pruning.slicing import prune_store
from nemo_minitron.pruning.targets import check_compensation
from tests.helpers.tiny import GEMMA2, LLAMA, random_weights

KEPT = torch.tensor([0, 2, 3, 6])


def activations(count: int = 400, width: int = 8) -> torch.Tensor:
    """``[n, w]`` correlated, so that channels can stand in for one another."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(width, width, generator=generator, dtype=torch.double)
    return torch.randn(count, width, generator=generator, dtype=torch.double) @ mix + 0.5


def moment(x: torch.Tensor) -> torch.Tensor:
    return x.t() @ x / len(x)


def test_column_map_is_least_squares() -> None:
    x = activations()
    weight = torch.randn(5, 8, dtype=torch.double)
    expected = torch.linalg.lstsq(x[:, KEPT], x @ weight.t()).solution.t()
    found = weight @ column_map(moment(x), KEPT, 1e-12).double()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_much_ridge_is_plain_cutting() -> None:
    weight = torch.randn(5, 8)
    found = weight @ column_map(moment(activations()), KEPT, 1e9)
    torch.testing.assert_close(found, weight[:, KEPT], rtol=0, atol=1e-6)


def test_norm_factor_restores_the_root_mean_square() -> None:
    weight = torch.tensor([0.5, 2.0, 1.0, 0.0, 3.0, 1.0, 0.2, 1.0], dtype=torch.double)
    x = activations()
    normed = x / x.square().mean(1, keepdim=True).sqrt()
    found = norm_factor(moment(normed * weight), weight[KEPT], KEPT)
    seen = KEPT[weight[KEPT] != 0]  # a channel that the norm mutes says nothing
    ratio = x[:, seen].square().mean(1) / x.square().mean(1)
    assert found == pytest.approx(ratio.mean().sqrt().item(), rel=1e-12)


def cut_plan() -> Plan:
    """Two of the layers, some channels of everything."""
    layers = [0, 2]
    whole = full_plan(LLAMA)
    return whole.replaced(
        layer=layers,
        hidden=list(range(0, LLAMA.hidden_size, 2)),
        ffn=[list(range(index, LLAMA.ffn_hidden_size, 3)) for index in range(len(layers))],
        head=[[0, 4] for _ in layers],
        query_group=[[0, 2] for _ in layers],
    )


def moments() -> dict[tuple[str, int], torch.Tensor]:
    generator = torch.Generator().manual_seed(1)

    def of(width: int) -> torch.Tensor:
        return moment(torch.randn(3 * width, width, generator=generator))

    count, head = LLAMA.num_layers, LLAMA.num_attention_heads * LLAMA.kv_channels
    found = {("hidden", index): of(LLAMA.hidden_size) for index in range(2 * count + 1)}
    found |= {("ffn", layer): of(LLAMA.ffn_hidden_size) for layer in range(count)}
    return found | {("head", layer): of(head) for layer in range(count)}


@pytest.mark.parametrize("block_bytes", [1 << 20, 900])
@pytest.mark.parametrize("tied", [True, False])
def test_which_tensors_change_and_how(monkeypatch, tied: bool, block_bytes: int) -> None:
    monkeypatch.setattr("nemo_minitron.checkpoint.lazy.BLOCK_BYTES", block_bytes)
    monkeypatch.setattr("nemo_minitron.pruning.slicing.CACHE_BYTES", block_bytes // 2)
    config = replace(LLAMA, share_embeddings_and_output_weights=tied)
    weights, known, plan = random_weights(config), moments(), cut_plan()
    store = {name: from_tensor(tensor) for name, tensor in weights.items()}
    axes, ridge = ["ffn", "head", "hidden"], 1e-2
    compensation = Compensation(axes, ridge, lambda axis, index: known[axis, index])
    found = prune_store(FAMILY, config, plan, store, compensation)
    plain = {n: t.read() for n, t in prune_store(FAMILY, config, plan, store).items()}
    hidden = torch.tensor(plan["hidden"])

    def expect(name: str, expected: torch.Tensor) -> None:
        torch.testing.assert_close(found[name].read(), expected, rtol=1e-5, atol=1e-6)
        plain.pop(name)

    for position, layer in enumerate(plan.layers):
        to, of = (f"decoder.layers.{number}." for number in (position, layer))
        for side, (norm, reader) in enumerate(
            (
                ("input_layernorm.weight", "self_attention.linear_qkv.weight"),
                ("pre_mlp_layernorm.weight", "mlp.linear_fc1.weight"),
            )
        ):
            matrix = known["hidden", 2 * layer + side]
            expect(to + norm, plain[to + norm] * norm_factor(matrix, plain[to + norm], hidden))
            rows = prune_store(
                FAMILY, config, plan.replaced(hidden=list(range(config.hidden_size))), store
            )[to + reader].read()
            expect(to + reader, rows @ column_map(matrix, hidden, ridge))
        fc2 = weights[of + "mlp.linear_fc2.weight"][hidden]
        ffn = torch.tensor(plan["ffn"][position])
        expect(to + "mlp.linear_fc2.weight", fc2 @ column_map(known["ffn", layer], ffn, ridge))
        d = config.kv_channels
        head = torch.cat([torch.arange(n * d, (n + 1) * d) for n in plan["head"][position]])
        proj = weights[of + "self_attention.linear_proj.weight"][hidden]
        name = to + "self_attention.linear_proj.weight"
        expect(name, proj @ column_map(known["head", layer], head, ridge))
    matrix, final = known["hidden", 2 * config.num_layers], "decoder.final_layernorm.weight"
    expect(final, plain[final] * norm_factor(matrix, plain[final], hidden))
    if not tied:
        name = "output_layer.weight"
        expect(name, weights[name] @ column_map(matrix, hidden, ridge))
    for name, tensor in plain.items():  # those that are only cut
        assert torch.equal(found[name].read(), tensor), name
    assert set(plain) == {"embedding.word_embeddings.weight"}


def test_a_norm_that_adds_one_to_its_weight_is_scaled_as_a_whole() -> None:
    """Gemma's norms multiply by ``1 + w``, and that is what the factor is of."""
    known, kept = moments(), torch.arange(0, GEMMA2.hidden_size, 2)
    compensation = Compensation(["hidden"], 1e-2, lambda axis, index: known[axis, index])
    rows = {name: (row, layer) for name, row, layer in GEMMA.parameters(GEMMA2)}
    row, layer = rows["decoder.layers.2.pre_mlp_layernorm.weight"]
    change = compensation.change(row, GEMMA2, layer, kept)
    assert change is not None
    weight = torch.linspace(-0.9, 2.0, len(kept))
    factor = norm_factor(known["hidden", 5], 1 + weight, kept)
    torch.testing.assert_close(change(weight), (1 + weight) * factor - 1)


def test_a_model_is_compensated_alike_however_its_norms_are_stored() -> None:
    known, hidden = moments(), list(range(0, GEMMA2.hidden_size, 2))
    plan = full_plan(GEMMA2).replaced(hidden=hidden)
    compensation = Compensation(["hidden"], 1e-2, lambda axis, index: known[axis, index])

    def pruned(config: ModelConfig, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        store = {name: from_tensor(tensor) for name, tensor in weights.items()}
        found = prune_store(GEMMA, config, plan, store, compensation)
        return {name: tensor.read() for name, tensor in found.items()}

    ordinary = replace(GEMMA2, layernorm_zero_centered_gamma=False)
    gains = random_weights(ordinary, family=GEMMA)
    one = {name: float(name.endswith("norm.weight")) for name in gains}
    wanted = pruned(ordinary, gains)
    found = pruned(GEMMA2, {name: gains[name] - one[name] for name in gains})
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name] + one[name], tensor, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("axes", "held", "message"),
    [
        (["head"], ["head"], r"holds head, of which nothing is cut"),
        (["ffn"], ["hidden"], r"needs second moments of ffn.*scores\.moments=\['ffn'\]"),
        (["ffn"], None, r"needs second moments of ffn"),
    ],
)
def test_what_cannot_be_compensated(axes, held, message) -> None:
    pruning = PruningConfig(target=TargetConfig(ffn_hidden_size=48), compensate=axes)
    with pytest.raises(ValueError, match=message):
        check_compensation(LLAMA, pruning, None if held is None else {"moments": held})
