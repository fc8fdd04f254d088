"""The layer spec of Transformer Engine, built of its real classes on a CPU.

Names of parameters and of what is stored are exactly the family table's, at one and at two ranks;
what is stored is what the local spec stores, also where one module holds all experts; every hook
sits on the module that has what it looks for. With the kernels replaced by plain torch (and only
so: see ``tests/te/kernels.py``) logits, scores and pruned weights are those of the local spec.
"""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from nemo_minitron.checkpoint.torch_dist import read_torch_dist
from nemo_minitron.checkpoint.torch_dist_read import open_torch_dist
from nemo_minitron.config.model import ModelConfig
from nemo_minitron.config.parallel import ParallelConfig
from nemo_minitron.config.stages import PruningConfig, TargetConfig
from nemo_minitron.families.registry import family_of
from nemo_minitron.families.table import Row
from tests.cases.live import logits_at, score_and_prune
from tests.helpers import tiny
from tests.te.environment import NoTransformerEngineError, run_ranks
from tests.te.ranks import Case, jobs

pytestmark = pytest.mark.timeout(300)

SAMPLES, LENGTH = 4, 16
MODELS = {
    "llama": tiny.LLAMA,
    "gpt2": tiny.GPT2,
    "qwen3": tiny.QWEN3,
    "nemotron": tiny.NEMOTRON,
    "mixtral": tiny.MIXTRAL,
    "qwen2_moe": tiny.QWEN2_MOE,
    "qwen3_next": tiny.QWEN3_NEXT,
}
# Layers that differ, so that what every layer of the others has is not in all of them.
DIFFERS = "qwen3_next"
_WIDTH = {"hidden_size": 48, "num_attention_heads": 4, "num_query_groups": 2}
RUN = {
    "llama": TargetConfig(**_WIDTH, ffn_hidden_size=64, num_layers=2),
    "qwen3": TargetConfig(**_WIDTH, ffn_hidden_size=64),
    "nemotron": TargetConfig(**_WIDTH, ffn_hidden_size=64),
    "mixtral": TargetConfig(**_WIDTH, num_moe_experts=2, moe_ffn_hidden_size=24, num_layers=2),
    "qwen2_moe": TargetConfig(
        num_moe_experts=2, moe_ffn_hidden_size=24, moe_shared_expert_intermediate_size=32
    ),
}
TP1: dict[str, Any] = {}
TP2 = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
EP2 = {"expert_model_parallel_size": 2}
LAYOUTS = {"tp1": TP1, "tp2": TP2, "ep2": EP2}
VOCAB = ("embedding.word_embeddings.weight", "output_layer.weight")
HAS_EXPERTS = [name for name, config in MODELS.items() if config.num_moe_experts]


def cases(home: Path) -> list[Case]:
    """Every model at one and at two ranks; those with experts also spread, and one by one."""
    found = []
    for name in MODELS:
        for layout in ("tp1", "tp2", *(["ep2"] if name in HAS_EXPERTS else [])):
            where = str(home / name / "checkpoint")
            hooked = name != DIFFERS
            found.append(
                Case(f"{name}-{layout}", where, LAYOUTS[layout], run=name in RUN, hooked=hooked)
            )
    where = str(home / "mixtral" / "checkpoint")
    found.append(Case("mixtral_each-tp1", where, TP1, grouped=False))
    found.append(Case("mixtral_each-tp2", where, TP2, grouped=False))
    return found


CASES = [case.name for case in cases(Path())]
HOOKED = [case.name for case in cases(Path()) if case.hooked]


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A result folder per model, with the tokens to run on beside its checkpoint."""
    folder = tmp_path_factory.mktemp("te")
    for seed, (name, config) in enumerate(MODELS.items()):
        tiny.write_result(folder / name, config, seed)
        ids = tiny.token_batch(SAMPLES, LENGTH - 1, config.vocab_size, seed)
        save_file({"ids": ids}, folder / name / "ids.safetensors")
    return folder


@pytest.fixture(scope="module")
def local(ranks, home: Path) -> dict[str, dict[str, Any]]:
    """What one rank has with the local spec; its plan is left for the others."""
    found = {}
    for name, target in RUN.items():
        folder, config = str(home / name / "checkpoint"), MODELS[name]
        ids = load_file(home / name / "ids.safetensors")["ids"]
        pruning, out = {"pruned": PruningConfig(target=target)}, str(home / name)
        job = (score_and_prune, config, folder, ids, ParallelConfig(), pruning, out)
        found[name] = ranks.run(1, *job)[0]
        found[name]["logits"] = ranks.run(1, logits_at, config, folder, ids, ParallelConfig())[0]
        found[name]["pruned"]["plan"].save(home / name)
    return found


@pytest.fixture(scope="module")
def answers(home: Path, local: dict[str, Any]) -> list[dict[str, Any]]:
    """Per rank, case -> what it has with Transformer Engine."""
    try:
        return run_ranks(2, jobs(cases(home)), home, timeout=240)
    except NoTransformerEngineError as error:
        pytest.skip(str(error))


def name_in_memory(row: Row, layer: int | None, grouped: bool, first_expert: int) -> str:
    """Name of a parameter on the rank that has it; experts are numbered within their rank."""
    if row.expert is not None and row.template is not None:
        row = row.template.of_expert(row.expert - first_expert)
    pattern = row.te_name or (row.grouped_name if grouped else None) or row.name
    return pattern.format(layer=layer)


@pytest.mark.parametrize("case", CASES)
def test_parameters_are_the_tables(answers, case: str) -> None:
    """Names, local shapes, and which are marked as split (gradient norms depend on it)."""
    name, layout = case.split("-")
    config = MODELS[name.removesuffix("_each")]
    tp, ep = 1 + (layout == "tp2"), 1 + (layout == "ep2")
    for rank in answers:
        first = rank[case]["first_expert"]
        mine = range(first, first + (config.num_moe_experts or 0) // ep)
        want = {}
        for _, row, layer in family_of(config).parameters(config):
            if row.expert is not None and row.expert not in mine:
                continue
            shape = list(row.shape(config))
            if row.tp_dim is not None:
                shape[row.tp_dim] = -(-shape[row.tp_dim] // tp)
            key = name_in_memory(row, layer, not name.endswith("_each"), first)
            want[key] = {"shape": shape, "split": tp > 1 and row.tp_dim is not None}
        got = rank[case]["parameters"]
        assert set(got) == set(want)
        if tp == 1:  # the mark is only read where there are several ranks
            got = {key: {**value, "split": False} for key, value in got.items()}
        assert got == want


@pytest.mark.parametrize("case", CASES)
def test_what_is_stored_is_the_tables(answers, home: Path, case: str) -> None:
    """Keys and global shapes are those of the checkpoint that was written without Megatron."""
    name = case.split("-")[0].removesuffix("_each")
    stored = open_torch_dist(home / name / "checkpoint")
    found = {key: stored.tensor(key) for key in stored.metadata.state_dict_metadata}
    want = {key: list(entry.size) for key, entry in found.items() if entry is not None}
    keys = {key for rank in answers for key in rank[case]["sharded"]["tensors"]}
    assert keys == set(want)
    for rank in answers:
        for key, shape in rank[case]["sharded"]["tensors"].items():
            if key not in VOCAB:  # padded in memory
                assert shape == want[key], key
        assert rank[case]["sharded"]["others"] == 0
        left_out = rank[case]["sharded"]["objects"]
        assert left_out
        assert all(key.endswith("_extra_state") for key in left_out)


@pytest.mark.parametrize("case", CASES)
def test_a_checkpoint_goes_through_unchanged(answers, home: Path, case: str) -> None:
    """Written by the table, loaded into Transformer Engine's modules, saved, read by the table."""
    name = case.split("-")[0].removesuffix("_each")
    config = MODELS[name]
    got = read_torch_dist(home / f"{case}-saved", family_of(config), config)
    want = tiny.read_weights(home / name)
    assert got.keys() == want.keys()
    assert [key for key in want if not torch.equal(got[key].read(), want[key])] == []


_FUSED_QKV = ("self_attention.linear_qkv", "input", "TELayerNormColumnParallelLinear")
_FUSED_FC1 = ("mlp.linear_fc1", "input", "TELayerNormColumnParallelLinear")
_PROJ = ("self_attention.linear_proj", "input", "TERowParallelLinear")
_FC2 = ("mlp.linear_fc2", "input", "TERowParallelLinear")
_LAYER = ("", "output", "TransformerLayer")
_ROUTER = ("mlp.router", "output", "TopKRouter")
_GROUPED = (
    ("mlp.experts", "output", "TEGroupedMLP"),
    ("mlp.experts.linear_fc2", "input", "TERowParallelGroupedLinear"),
)
_SHARED = ("mlp.shared_experts.linear_fc2", "input", "TERowParallelLinear")


def expected_of_scores(name: str, norm: str, local_experts: int) -> set[tuple[str, str, str]]:
    """Where hooks of scoring sit in every layer."""
    found = {_FUSED_QKV, _PROJ, _LAYER}
    if name not in HAS_EXPERTS and name != "mixtral_each":
        return found | {_FUSED_FC1, _FC2}
    found |= {("pre_mlp_layernorm", "output", norm), _ROUTER}
    if name == "mixtral_each":
        for expert in range(local_experts):
            module = f"mlp.experts.local_experts.{expert}"
            found |= {(module, "output", "MLP"), (module + ".linear_fc2", *_FC2[1:])}
        return found
    return found | {*_GROUPED} | ({_SHARED} if name == "qwen2_moe" else set())


@pytest.mark.parametrize("case", HOOKED)
def test_hooks_of_scoring_find_their_places(answers, case: str) -> None:
    name, layout = case.split("-")
    config = MODELS[name.removesuffix("_each")]
    norm = config.normalization
    experts = (config.num_moe_experts or 0) // (1 + (layout == "ep2"))
    for rank in answers:
        layers: dict[str, set[tuple[str, str, str]]] = {}
        outside = set()
        for hook in rank[case]["hooks"]:
            if hook["owner"] == "scores":
                found = re.fullmatch(r"decoder\.layers\.(\d+)\.?(.*)", hook["module"])
                entry = hook["kind"], hook["class"]
                if found:
                    layers.setdefault(found[1], set()).add((found[2], *entry))
                else:
                    outside.add((hook["module"], *entry))
        assert set(layers) == {str(layer) for layer in range(config.num_layers)}
        want = expected_of_scores(name, norm, experts)
        for layer, got in layers.items():
            first = {("", "input", "TransformerLayer")} if layer == "0" else set()
            assert got == want | first
        assert outside == {
            ("", "output", "HiddenGPTModel"),  # the end of a micro-batch
            ("decoder.final_layernorm", "output", norm),  # second moments of the hidden state
        }


@pytest.mark.parametrize("case", HOOKED)
def test_hooks_of_intermediate_losses_find_their_places(answers, case: str) -> None:
    name = case.split("-")[0]
    config = MODELS[name.removesuffix("_each")]
    dense = config.num_moe_experts is None
    norm = ("decoder.final_layernorm", "output", config.normalization)
    want = {}
    for layer in range(config.num_layers):
        prefix = f"decoder.layers.{layer}."
        qkv = (prefix + _FUSED_QKV[0], *_FUSED_QKV[1:])
        mlp = ("pre_mlp_layernorm", "output", config.normalization)
        mlp = _FUSED_FC1 if dense else mlp
        want[f"embedding {layer}"] = want[f"block_output {layer}"] = qkv
        want[f"mlp_input {layer}"] = (prefix + mlp[0], *mlp[1:])
        core = (prefix + "self_attention.core_attention", "input", "TEDotProductAttention")
        want[f"attention_relation {layer}"] = core
    last = config.num_layers
    want[f"embedding {last}"] = want[f"block_output {last}"] = norm
    for rank in answers:
        hooks = [hook for hook in rank[case]["hooks"] if hook["owner"] != "scores"]
        got = {hook["owner"]: (hook["module"], hook["kind"], hook["class"]) for hook in hooks}
        assert len(hooks) == len(got)
        assert got == want


@pytest.mark.parametrize("case", CASES)
def test_settings_of_a_gpu(answers, case: str) -> None:
    """Experts are multiplied together wherever there are any and Transformer Engine can."""
    config = MODELS[case.split("-")[0].removesuffix("_each")]
    for rank in answers:
        settings = rank[case]["settings"]
        assert settings["moe_grouped_gemm"] == (
            config.num_moe_experts is not None and "_each" not in case
        )
        assert settings["apply_rope_fusion"]
        assert settings["bias_activation_fusion"] == (config.activation == "silu")


RUNS = [name for name in CASES if name.split("-")[0] in RUN]


@pytest.mark.parametrize("case", RUNS)
def test_logits_and_scores_are_the_local_specs(answers, local, home: Path, case: str) -> None:
    want = local[case.split("-")[0]]
    for rank in range(len(answers)):
        got = load_file(home / f"{case}.{rank}.safetensors")
        vocab = MODELS[case.split("-")[0]].vocab_size
        logits = want["logits"][..., :vocab]
        torch.testing.assert_close(got["logits"][..., :vocab], logits, rtol=1e-4, atol=1e-4)
        for axis, values in want["scores"].items():
            torch.testing.assert_close(
                got[f"scores.{axis}"], torch.as_tensor(values), rtol=1e-5, atol=1e-9
            )
        assert len(got) == 1 + len(want["scores"])


@pytest.mark.parametrize("case", RUNS)
def test_live_pruning_gives_the_local_specs_tensors(answers, local, home: Path, case: str) -> None:
    """Experts dropped, their channels, heads, hidden and layers cut: bit for bit the same."""
    name = case.split("-")[0]
    small = ModelConfig.load(home / f"{case}-pruned")
    got = read_torch_dist(home / f"{case}-pruned", family_of(small), small)
    want = read_torch_dist(home / name / "pruned", family_of(small), small)
    assert [key for key in want if not torch.equal(got[key].read(), want[key].read())] == []
