"""A bf16 model without Megatron's wrapper (a teacher, a scored model) is bf16 throughout."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

import nemo_minitron
from nemo_minitron.config.model import ModelConfig
from nemo_minitron.config.parallel import ParallelConfig
from nemo_minitron.config.stages import ImportConfig
from nemo_minitron.families.llama import LLAMA as FAMILY
from nemo_minitron.stages import import_
from tests.helpers import tiny

MODELS = {
    "llama": tiny.LLAMA,
    "qwen3": tiny.QWEN3,
    "nemotron": tiny.NEMOTRON,
    "gpt2": tiny.GPT2,
    "mixtral": tiny.MIXTRAL,
    "qwen2_moe": tiny.QWEN2_MOE,
}


def _dtypes_and_states(config: ModelConfig) -> tuple[set[str], torch.Tensor, torch.Tensor]:
    """Parameter dtypes; final hidden states in bf16, and in fp32 of the same rounded weights."""
    from nemo_minitron.models.build import build_gpt
    from nemo_minitron.runtime.groups import ParallelGroups
    from nemo_minitron.runtime.launch import init_model_parallel

    init_model_parallel(ParallelConfig())
    groups = ParallelGroups.current()
    (half,) = build_gpt(config, ParallelConfig(), groups, dtype=torch.bfloat16)
    (full,) = build_gpt(config, ParallelConfig(), groups)
    dtypes = {str(parameter.dtype) for parameter in half.parameters()}
    generator = torch.Generator().manual_seed(0)
    for coarse, fine in zip(half.parameters(), full.parameters(), strict=True):
        coarse.data.copy_(torch.randn(coarse.shape, generator=generator) * 0.1)
        fine.data.copy_(coarse.data)
    ids = tiny.token_batch(1, 15, config.vocab_size)
    states = []
    for chunk in (half, full):
        chunk.eval()
        chunk.return_hidden = True
        with torch.no_grad():
            states.append(chunk(ids, torch.arange(16)[None], None))
    return dtypes, states[0], states[1]


def _export_as_trained(checkpoint: str, folder: str) -> None:
    """Open a model in fp32, as a training has it, and export it from memory."""
    from nemo_minitron.runtime.launch import init_model_parallel

    init_model_parallel(ParallelConfig())
    nemo_minitron.export(nemo_minitron.open_model(checkpoint, dtype="float32"), folder)


def _export_twice(checkpoint: str, folder: str) -> list[str]:
    """Export a model with a weight that is no number, and again when it is one."""
    from nemo_minitron.runtime.launch import init_model_parallel

    init_model_parallel(ParallelConfig(tensor_model_parallel_size=2))
    chunks = nemo_minitron.open_model(checkpoint, dtype="float32")
    weight = chunks[0].decoder.final_layernorm.weight.data
    number, weight[3] = float(weight[3]), float("nan")
    said = []
    for size in ("5GB", "large"):
        with pytest.raises(ValueError, match=r".") as error:
            nemo_minitron.export(chunks, folder, max_shard_size=size)
        said.append(str(error.value))
    weight[3] = number
    nemo_minitron.export(chunks, folder)
    return said


def _bias_once_trained(config: ModelConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """Bias of the last router: as loaded, and wrapped for a training."""
    from nemo_minitron.config.optim import OptimConfig
    from nemo_minitron.models.build import build_gpt
    from nemo_minitron.models.optim import wrap_ddp
    from nemo_minitron.runtime.groups import ParallelGroups
    from nemo_minitron.runtime.launch import init_model_parallel

    init_model_parallel(ParallelConfig())
    groups = ParallelGroups.current()
    (chunk,) = build_gpt(config, ParallelConfig(), groups, dtype=torch.bfloat16)
    router = chunk.decoder.layers[-1].mlp.router
    bias = 1.0 + torch.arange(router.expert_bias.numel()) / 1000
    state = {k: bias if k.endswith("expert_bias") else v for k, v in chunk.state_dict().items()}
    chunk.load_state_dict(state)
    (wrapped,) = wrap_ddp([chunk], OptimConfig())
    assert {parameter.dtype for parameter in wrapped.parameters()} == {torch.bfloat16}
    return bias, router.expert_bias.clone()


@pytest.mark.parametrize("config", [tiny.GLM4_MOE, tiny.DEEPSEEK_EXPERTS], ids=lambda c: c.family)
def test_the_bias_of_a_router_is_not_rounded_for_training(ranks, config):
    """In bf16 these are all 1: other experts would be picked than by the teacher."""
    bias, trained = ranks.run(1, _bias_once_trained, config)[0]
    assert trained.dtype == torch.float32
    assert torch.equal(trained, bias)


def test_an_export_that_is_refused_says_so_on_every_rank_and_leaves_nothing(ranks, tmp_path):
    tiny.write_result(tmp_path / "model", tiny.LLAMA, 0)
    target = tmp_path / "hf" / "exported"
    target.parent.mkdir()
    said = ranks.run(2, _export_twice, str(tmp_path / "model"), str(target))
    for first, second in said:
        assert "final_layernorm" in first
        assert second.startswith("max_shard_size=large must be a number")
    assert [path.name for path in target.parent.iterdir()] == ["exported"]
    assert (target / "config.json").is_file()
    with pytest.raises(ValueError, match="max_shard_size=large"):
        nemo_minitron.export(tmp_path / "model", tmp_path / "again", max_shard_size="large")
    assert not (tmp_path / "again").exists()


def test_what_is_exported_says_the_dtype_it_has_in_memory(ranks, tmp_path):
    """Whatever dtype its source had; from files alone a model is exported as it came."""
    sizes = tiny.LLAMA
    model = LlamaForCausalLM(LlamaConfig(**FAMILY.to_hf(sizes))).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "hf")
    import_.run(ImportConfig(source=str(tmp_path / "hf"), output_dir=str(tmp_path / "model")))
    nemo_minitron.export(tmp_path / "model", tmp_path / "untrained")
    ranks.run(1, _export_as_trained, str(tmp_path / "model"), str(tmp_path / "trained"))
    source, untrained, trained = (
        json.loads((tmp_path / name / "config.json").read_text())
        for name in ("hf", "untrained", "trained")
    )
    assert untrained == source
    assert source["dtype"] == "bfloat16"
    assert trained == {**source, "dtype": "float32"}
    for name, dtype in (("untrained", torch.bfloat16), ("trained", torch.float32)):
        weights = load_file(tmp_path / name / "model.safetensors")
        assert {tensor.dtype for tensor in weights.values()} == {dtype}
        again = LlamaForCausalLM.from_pretrained(tmp_path / name, dtype="auto")
        assert again.dtype == dtype
    assert all(torch.equal(weights[name], w.float()) for name, w in model.state_dict().items())


@pytest.mark.parametrize("family", MODELS)
def test_one_dtype_throughout(ranks, family):
    """Norms and learned positions too: their fp32 weights would fail on CUDA, GPT-2's anywhere."""
    dtypes, half, full = ranks.run(1, _dtypes_and_states, MODELS[family])[0]
    assert dtypes == {"torch.bfloat16"}
    assert half.dtype == torch.bfloat16
    assert (half.float() - full).norm() / full.norm() < 0.05
