"""config.json of Nemotron-H: what is refused, and what is written when layers are gone."""

import pytest
import transformers

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


@pytest.mark.parametrize("key", ["layers_block_type", "layer_types"])
@pytest.mark.parametrize("words", [KINDS, ["linear_attention", "full_attention", "mlp", "moe"]])
def test_layers_keep_the_words_of_their_source(key: str, words: list[str]) -> None:
    """Releases of transformers that say "mamba" do not know "linear_attention"."""
    bare = {name: value for name, value in PUBLISHED.items() if name != "hybrid_override_pattern"}
    _, config = read_config({**bare, key: words})
    written = written_config(config.resized({}, [0, 1, 3]))
    assert written[key] == [words[layer] for layer in (0, 1, 3)]
    assert "hybrid_override_pattern" not in written


def test_the_other_name_of_the_number_of_experts() -> None:
    """Where a config.json has both, transformers takes num_local_experts."""
    both = {**PUBLISHED, "num_local_experts": 4}
    alone = {key: value for key, value in both.items() if key != "n_routed_experts"}
    for source in (both, alone):
        _, config = read_config(source)
        assert config.num_moe_experts == 4
        assert written_config(config) == source
        written = written_config(config.resized({"num_moe_experts": 2}))
        theirs = transformers.AutoConfig.for_model(**written)
        assert theirs.n_routed_experts == read_config(written)[1].num_moe_experts == 2
    with pytest.raises(ValueError, match="n_routed_experts=4 and num_local_experts=8 disagree"):
        read_config({**PUBLISHED, "num_local_experts": 8})
