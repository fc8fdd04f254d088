"""config.json of Nemotron-H: what is refused, and what is written when layers are gone."""

import pytest

from nemo_minitron.families.registry import read_config, written_config
from tests.unit.test_written_config import MODELS

PUBLISHED = {
    **MODELS["nemotron_h"],
    "model_type": "nemotron_h",
    "architectures": ["NemotronHForCausalLM"],
}
KINDS = ["mamba", "attention", "mlp", "moe"]


def test_another_epsilon_than_that_of_the_gated_norm() -> None:
    """Megatron-Core's gated norm has 1e-5, and transformers' that of config.json."""
    with pytest.raises(ValueError, match="layer_norm_epsilon=1e-06"):
        read_config({**PUBLISHED, "layer_norm_epsilon": 1e-6})
    read_config({**PUBLISHED, "layer_norm_epsilon": 1e-5})


@pytest.mark.parametrize("keys", [{}, {"layers_block_type": KINDS}])
def test_layers_that_are_left(keys) -> None:
    """Where a source says its layers twice, both are written, and they agree."""
    _, config = read_config({**PUBLISHED, **keys})
    small = config.resized({}, [0, 1, 3])
    written = written_config(small)
    assert written["hybrid_override_pattern"] == "M*E"
    assert len(written.get("layers_block_type", [])) == (3 if keys else 0)
    assert read_config(written)[1].hybrid_layer_pattern == "M*E"
