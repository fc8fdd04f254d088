"""A bf16 model without Megatron's wrapper (a teacher, a scored model) is bf16 throughout."""

import pytest
import torch

from nemo_minitron.config.model import ModelConfig
from nemo_minitron.config.parallel import ParallelConfig
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


@pytest.mark.parametrize("family", MODELS)
def test_one_dtype_throughout(ranks, family):
    """Norms and learned positions too: their fp32 weights would fail on CUDA, GPT-2's anywhere."""
    dtypes, half, full = ranks.run(1, _dtypes_and_states, MODELS[family])[0]
    assert dtypes == {"torch.bfloat16"}
    assert half.dtype == torch.bfloat16
    assert (half.float() - full).norm() / full.norm() < 0.05
