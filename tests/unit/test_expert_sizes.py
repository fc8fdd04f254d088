"""Sizes of experts that transformers cannot multiply are named, and only those."""

from dataclasses import replace

import pytest
import torch
import transformers

from nemo_minitron.families.experts import warn_of_expert_sizes
from nemo_minitron.families.registry import family_of
from tests.helpers.tiny import GPT_OSS, LLAMA, MIXTRAL, QWEN2_MOE


def runs(config) -> bool:
    """Whether transformers runs the experts of a random model as it does by default."""
    family = family_of(config)
    hf = transformers.AutoConfig.for_model(**family.to_hf(config))
    dtype = getattr(torch, config.dtype)
    model = transformers.AutoModelForCausalLM.from_config(hf, dtype=dtype).eval()
    try:
        with torch.no_grad():
            model(torch.arange(20)[None])
    except RuntimeError as error:
        assert "16 bytes" in str(error)  # noqa: PT017 - it is the one error that is expected
        return False
    return True


@pytest.mark.parametrize("config", [MIXTRAL, QWEN2_MOE, GPT_OSS], ids=lambda m: m.family)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("hidden", "ffn"), [(64, 40), (64, 36), (64, 33), (60, 40), (62, 40)])
def test_named_are_those_that_do_not_run(config, dtype, hidden, ffn, caplog):
    sizes = {"hidden_size": hidden, "moe_ffn_hidden_size": ffn, "ffn_hidden_size": ffn}
    small = replace(config.resized(sizes, [0]), dtype=dtype)
    said = warn_of_expert_sizes(small)
    assert (not said) == runs(small)
    assert all(line in caplog.text for line in said)
    if ffn == 33:
        step = {"float32": 4, "bfloat16": 8}[dtype]
        assert f"moe_ffn_hidden_size=33 is no multiple of {step} (16 bytes of {dtype})" in said[0]


def test_the_shared_expert_and_dense_models_may_be_of_any_size():
    assert not warn_of_expert_sizes(replace(QWEN2_MOE, moe_shared_expert_intermediate_size=51))
    assert not warn_of_expert_sizes(replace(LLAMA, hidden_size=33, ffn_hidden_size=7))
