"""What is wrong with a Megatron or NeMo checkpoint is named; nothing in it is run."""

import io
import json
import pickle
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from nemo_minitron.checkpoint.common_state import COMMON_KEY
from nemo_minitron.checkpoint.foreign.megatron_fields import match_family, model_fields
from nemo_minitron.checkpoint.foreign.megatron_stated import of_args, of_core, of_nemo1
from nemo_minitron.checkpoint.megatron_args import megatron_lm_args, stored
from nemo_minitron.checkpoint.parts import Part, archive_parts
from nemo_minitron.checkpoint.safe_pickle import Inert, read_metadata, read_torch_file
from nemo_minitron.checkpoint.source import open_source
from nemo_minitron.checkpoint.tokenizer import special_ids, tokenizer_files, vocabulary_size
from nemo_minitron.config.model import ModelConfig
from tests.helpers import sources, tiny
from tests.helpers.tiny import LLAMA, random_weights, write_weights

PADDED = replace(LLAMA, vocab_size=128)


def whole(path: Path) -> Part:
    return Part(path, 0, path.stat().st_size)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a padded vocabulary, as Megatron-Core lays it out."""
    folder = tmp_path_factory.mktemp("weights") / "iter_0000010"
    write_weights(folder, PADDED, 0)
    return folder


@pytest.fixture
def lm(weights: Path, tmp_path: Path) -> Path:
    """The same as a folder of Megatron-LM."""
    folder = tmp_path / "lm" / "iter_0000010"
    shutil.copytree(weights, folder)
    set_args(folder)
    (tmp_path / "lm" / "latest_checkpointed_iteration.txt").write_text("10")
    return folder


def set_args(folder: Path, **over: Any) -> None:
    torch.save({"args": sources.megatron_args(LLAMA, **over)}, folder / "common.pt")


def refuses(path: Path, *says: str, **keys: Any) -> None:
    with pytest.raises(ValueError, match=r"^(source: |tokenizer=|vocab_size=)") as error:
        open_source(str(path), **keys)
    for words in says:
        assert words in str(error.value), str(error.value)


@pytest.mark.parametrize(
    "state", [None, io.BytesIO(b"x"), torch.empty(0, dtype=torch.uint8), torch.ones(5).byte()]
)
def test_states_of_transformer_engine_are_no_weights(tmp_path: Path, state: object) -> None:
    """They are objects before Transformer Engine 2.0 and tensors since then."""
    named: dict[str, object] = {f"model.{n}": value for n, value in random_weights(LLAMA).items()}
    weights = named | {"model.decoder.layers.0.self_attention.linear_qkv._extra_state": state}
    torch.save(weights, tmp_path / "model_weights.ckpt")
    said = sources.nemo1_config(LLAMA, override_vocab_size=None)
    (tmp_path / "model_config.yaml").write_text(yaml.safe_dump(said))
    store = open_source(str(tmp_path), vocab_size=LLAMA.vocab_size).store
    assert {f"model.{name}" for name in store} == {*named}


# ---------------------------------------------------------------- which checkpoint


def test_tokenizer_without_words(lm: Path) -> None:
    """Since core 0.18 NullTokenizer has as many tokens as it is given, and an argument says so."""
    assert open_source(str(lm)).config.vocab_size == LLAMA.vocab_size
    set_args(lm, null_tokenizer_eod_id=None)
    assert open_source(str(lm)).config.vocab_size == LLAMA.vocab_size - 1
    set_args(lm, tokenizer_type="NullMultimodalTokenizer")  # adds one in every version
    assert open_source(str(lm)).config.vocab_size == LLAMA.vocab_size


def test_iterations(lm: Path) -> None:
    assert open_source(str(lm.parent)).config.vocab_size == LLAMA.vocab_size
    tracker = lm.parent / "latest_checkpointed_iteration.txt"
    tracker.write_text("20")
    refuses(lm.parent, "names iter_0000020, which is missing", "holds iter_0000010")
    tracker.write_text("nonsense")
    refuses(lm.parent, "'nonsense', not an iteration or 'release'")
    tracker.unlink()
    assert open_source(str(lm.parent)).config.num_layers == LLAMA.num_layers
    (lm.parent / "iter_0000020").mkdir()
    refuses(lm.parent, "iter_0000010, iter_0000020 but no latest_checkpointed_iteration.txt")


def test_other_formats(lm: Path, tmp_path: Path) -> None:
    (lm / "metadata.json").rename(tmp_path / "metadata.json")
    refuses(lm, "no metadata.json", "torch_dcp or fsdp_dtensor", "--ckpt-convert-format torch_dist")
    (lm / "metadata.json").write_text('{"sharded_backend": "zarr"}')
    refuses(lm, "sharded_backend=zarr, not torch_dist", "NeMo 2.0's nlp collection")
    legacy = tmp_path / "legacy" / "iter_0000010" / "mp_rank_00"
    legacy.mkdir(parents=True)
    (legacy / "model_optim_rng.pt").touch()
    (tmp_path / "legacy" / "latest_checkpointed_iteration.txt").write_text("10")
    refuses(tmp_path / "legacy", "holds mp_rank_00: Megatron's legacy format", "--ckpt-convert")


def test_what_megatron_converted(lm: Path, tmp_path: Path) -> None:
    """``--ckpt-convert-save FOLDER`` writes FOLDER/torch_dist."""
    folder = tmp_path / "converted"
    shutil.copytree(lm.parent, folder / "torch_dist")
    assert replace(open_source(str(folder)).config, hf={}) == LLAMA
    assert open_source(str(folder / "torch_dist")).config.num_layers == LLAMA.num_layers


@pytest.mark.parametrize("name", ["hybrid_layer_pattern", "hybrid_override_pattern"])
def test_hybrid_models(lm: Path, name: str) -> None:
    """Told apart by what the settings say, or by the name of the last norm."""
    set_args(lm, **{name: "*-*-*-*-"})
    refuses(lm, f"{name}=*-*-*-*-: a HybridModel", "export it to Hugging Face format")
    set_args(lm)
    metadata = read_metadata(whole(lm / ".metadata"))
    saved = metadata.state_dict_metadata
    saved["decoder.final_norm.weight"] = saved.pop("decoder.final_layernorm.weight")
    (lm / ".metadata").write_bytes(pickle.dumps(metadata))
    refuses(lm, "holds decoder.final_norm.weight: a HybridModel")


@pytest.mark.parametrize(
    "key",
    [
        "optimizer.state.exp_avg.output_layer.weight",  # fully_reshardable, and each on its own
        "chained_0.optimizer.state.exp_avg.output_layer.weight",
        "optimizer.distributed.dp_group_idx_0.gbuf_idx_0.bucket_idx_0.exp_avg",  # dp_reshardable
    ],
)
def test_optimizer_state_is_left_where_it_is(lm: Path, key: str) -> None:
    """However it is sharded; tests/data/foreign has real ones of each."""
    metadata = read_metadata(whole(lm / ".metadata"))
    saved = metadata.state_dict_metadata
    saved[key] = saved["decoder.final_layernorm.weight"]
    (lm / ".metadata").write_bytes(pickle.dumps(metadata))
    assert replace(open_source(str(lm)).config, hf={}) == LLAMA


def test_settings_of_megatron_lm(lm: Path) -> None:
    torch.save({"iteration": 10}, lm / "common.pt")
    refuses(lm, "common.pt lacks args", "Megatron-LM saves")
    (lm / "common.pt").write_bytes(b"PK")
    refuses(lm, "common.pt is damaged")
    (lm / "common.pt").unlink()
    metadata = read_metadata(whole(lm / ".metadata"))
    place = next(index for index in metadata.storage_data if index.fqn == COMMON_KEY)
    info = metadata.storage_data[place]
    with (lm / info.relative_path).open("r+b") as file:
        file.seek(info.offset)
        file.write(b"xx")
    refuses(lm, f"{COMMON_KEY} in ", "is damaged")
    del metadata.storage_data[place]
    (lm / ".metadata").write_bytes(pickle.dumps(metadata))
    refuses(lm, "common.pt is missing", "the object common_state")
    (lm / ".metadata").write_bytes(b"PK")
    refuses(lm, ".metadata is damaged")


def test_settings_among_the_tensors(lm: Path, tmp_path: Path) -> None:
    """As Megatron-Core 0.19 and later write them; ours are there for both. Nothing is run."""
    (lm / "common.pt").unlink()
    assert replace(open_source(str(lm)).config, hf={}) == PADDED
    trace = tmp_path / "trace"
    args = sources.megatron_args(LLAMA, extra=[Evil(trace)])
    metadata = read_metadata(whole(lm / ".metadata"))
    (place,) = (index for index in metadata.storage_data if index.fqn == COMMON_KEY)
    written = stored({"args": args}).getvalue()
    (lm / "theirs.distcp").write_bytes(b"before" + written)
    metadata.storage_data[place] = replace(
        metadata.storage_data[place], relative_path="theirs.distcp", offset=6, length=len(written)
    )
    (lm / ".metadata").write_bytes(pickle.dumps(metadata))
    assert replace(open_source(str(lm)).config, hf={}) == LLAMA
    assert not trace.exists()


def test_results_are_no_sources(tmp_path: Path) -> None:
    write_weights(tmp_path / "out" / "checkpoint", LLAMA, 0)
    LLAMA.save(tmp_path / "out" / "checkpoint")
    for path in (tmp_path / "out", tmp_path / "out" / "checkpoint"):
        refuses(path, "is a result of minitron; give it to the next stage (checkpoint=")


def test_nemo2_halves(weights: Path, tmp_path: Path) -> None:
    root = tmp_path / "nemo2"
    sources.write_nemo2(root, LLAMA)
    refuses(root, "weights is missing: ", "half of a NeMo 2 checkpoint")
    shutil.copytree(weights, root / "weights")
    assert open_source(str(root)).config.vocab_size == LLAMA.vocab_size
    (root / "context" / "model.yaml").write_text("a: [")
    refuses(root, "model.yaml cannot be read")
    (root / "context" / "model.yaml").unlink()
    refuses(root, "context/model.yaml is missing")


def test_archives(tmp_path: Path) -> None:
    path = tmp_path / "model.nemo"
    path.write_bytes(b"nothing of the kind" * 100)
    refuses(path, "model.nemo is not a tar archive")
    (tmp_path / "model_config.yaml").write_text(yaml.safe_dump(sources.nemo1_config(LLAMA)))
    with tarfile.open(path, "w:gz") as tar:
        tar.add(tmp_path / "model_config.yaml", arcname="./model_config.yaml")
    refuses(path, "is compressed; unpack it")
    (tmp_path / "mp_rank_00").mkdir()
    with tarfile.open(path, "w:") as tar:
        tar.add(tmp_path / "model_config.yaml", arcname="./model_config.yaml")
        tar.add(tmp_path / "model_config.yaml", arcname="./mp_rank_00/model_weights.ckpt")
    refuses(path, "holds mp_rank_00, weights cut for one layout")
    whole_file = path.read_bytes()
    path.write_bytes(whole_file[: archive_parts(path)["model_config.yaml"].offset + 10])
    refuses(path, "model.nemo is")


# ---------------------------------------------------------------- what model


@pytest.mark.parametrize(
    ("over", "says"),
    [
        ({"hidden_size": None}, "args in * does not say hidden_size"),
        ({"position_embedding_type": "mrope"}, "position_embedding_type=mrope is not supported"),
        ({"position_embedding_type": "yarn"}, "does not say yarn_rotary_scaling_factor"),
        (
            {"use_rope_scaling": True, "rope_scaling_factor": 32.0},
            "rope_scaling_factor=32.0 is not",
        ),
        ({"num_experts": 4, "moe_mlp_glu_interleave_size": 32}, "moe_mlp_glu_interleave_size=32"),
        ({"rotary_base": (10_000, 1_000_000)}, "only one whole number"),
        ({"rotary_base": 10_000.5}, "rotary_base=10000.5 is not supported; only one whole number"),
        ({"window_size": 512}, "window_size=512 is not supported"),
        ({"quick_geglu": True, "swiglu": False}, "this activation (activation=quick_gelu)"),
        ({"multi_latent_attention": True}, "multi_latent_attention=True is not supported"),
        (
            {"num_experts": 4, "moe_layer_freq": [1, 0]},
            "moe_layer_freq=[1, 0] is not supported; only a list of num_layers=",
        ),
        (
            {"rotary_seq_len_interpolation_factor": 2, "use_rope_scaling": True},
            "rotary_seq_len_interpolation_factor=2",
        ),
        ({"heterogeneous_layers_config_encoded_json": "{}"}, "heterogeneous_layers_config_path"),
        ({"norm_epsilon": 1e-5, "normalization": "LayerNorm"}, "normalization=LayerNorm"),
        ({"add_bias_linear": True}, "no supported family has this add_bias_linear"),
        ({"num_query_groups": 3}, "must be a multiple of num_query_groups=3"),
        ({"num_layers": 5}, "in 5 layers"),
        ({"num_layers": "4"}, "num_layers=4 is not supported; only a whole number above 0"),
        ({"hidden_size": 64.5}, "hidden_size=64.5 is not supported; only a whole number above 0"),
        ({"num_attention_heads": 0}, "num_attention_heads=0 is not supported; only a whole"),
        ({"num_experts": [4]}, "num_experts=[4] is not supported; only a whole number above 0"),
        ({"norm_epsilon": []}, "norm_epsilon=[] is not supported; only a number"),
        ({"num_experts": 4, "moe_layer_freq": 2.5}, "moe_layer_freq=2.5 is not supported; only a"),
        ({"window_size": [5]}, "has a value of a type that Megatron does not write there: list"),
        ({"spec": 5}, "has a value of a type that Megatron does not write there"),
        ({"vocab_size": 200}, "embeddings of 128 tokens, but args in"),
        ({"vocab_size": [200]}, "vocab_size=[200] is not supported; only a whole number"),
        ({"tokenizer_type": "Llama2Tokenizer"}, "set tokenizer to the folder that has it, or "),
    ],
)
def test_settings_are_named(lm: Path, over: dict[str, Any], says: str) -> None:
    set_args(lm, **over)
    refuses(lm, *says.split("*")[-1:])


def test_vocabulary(lm: Path, tmp_path: Path) -> None:
    set_args(lm, tokenizer_type="HuggingFaceTokenizer", tokenizer_model="some/where")
    assert open_source(str(lm), vocab_size=101).config.vocab_size == 101
    sources.write_tokenizer(tmp_path / "tokenizer", 120)
    opened = open_source(str(lm), tokenizer=str(tmp_path / "tokenizer"))
    assert opened.config.vocab_size == 120
    assert opened.config.hf == {"bos_token_id": 118, "eos_token_id": 119}
    opened.save_extras(tmp_path)
    assert (tmp_path / "tokenizer_config.json").is_file()
    sources.write_tokenizer(lm / "tokenizer", 120)
    set_args(lm, tokenizer_type="HuggingFaceTokenizer", tokenizer_model="tokenizer")
    assert open_source(str(lm)).config.vocab_size == 120
    refuses(lm, "embeddings of 128 tokens, but vocab_size says 129", vocab_size=129)
    refuses(lm, "is not a folder with tokenizer.json", tokenizer=str(lm))


def test_sentencepiece(tmp_path: Path) -> None:
    spm = pytest.importorskip("sentencepiece")
    (tmp_path / "text").write_text("\n".join(f"word {i} and some more" for i in range(50)))
    spm.SentencePieceTrainer.train(
        input=str(tmp_path / "text"),
        model_prefix=str(tmp_path / "tokenizer"),
        vocab_size=40,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    files = tokenizer_files(tmp_path)
    size = vocabulary_size(files)
    assert size is not None
    assert 20 < size <= 40
    assert special_ids(files) == {"bos_token_id": 1, "eos_token_id": 2}


@pytest.mark.parametrize(
    "config", [LLAMA, tiny.MIXTRAL, tiny.QWEN2_MOE, tiny.QWEN3, tiny.NEMOTRON, tiny.GPT2]
)
def test_same_fields_from_every_file(config: Any) -> None:
    said = [of_core(sources.core_fields(config), "yaml")]
    nested = {"transformer": sources.core_fields(config), "seq_length": 128}
    said.append(of_core(nested, "yaml"))
    if config.moe_shared_expert_gate is False:
        said.append(of_args(vars(sources.megatron_args(config)), "args"))
    if config in (LLAMA, tiny.NEMOTRON):
        said.append(of_nemo1(sources.nemo1_config(config), "nemo"))
    for stated in said:
        family, found = match_family(stated, model_fields(stated, config.vocab_size))
        assert found == config
        assert family.name == config.family


@pytest.mark.parametrize(
    "config", [LLAMA, tiny.MIXTRAL, tiny.QWEN2_MOE, tiny.QWEN3, tiny.NEMOTRON, tiny.GPT2]
)
def test_what_we_write_says_what_it_is(config: ModelConfig) -> None:
    """``args`` in our own checkpoints, which Megatron-LM and Bridge read, are the whole model."""
    stated = of_args(vars(megatron_lm_args(config)), "args")
    _, found = match_family(stated, model_fields(stated, config.vocab_size))
    assert found == config
    assert megatron_lm_args(config).padded_vocab_size == 128


@pytest.mark.parametrize("tokens", [101, 128, 129, 257, 50257, 128256, 256001])
def test_every_program_pads_to_all_tokens(tokens: int) -> None:
    """Megatron-LM's NullTokenizer counts one token more than Bridge's."""
    args = megatron_lm_args(replace(LLAMA, vocab_size=tokens))
    for counted in (args.vocab_size, args.vocab_size + 1):
        step = args.make_vocab_size_divisible_by
        assert -(-counted // step) * step == args.padded_vocab_size >= tokens
    assert args.padded_vocab_size % 128 == 0


@pytest.mark.parametrize("before", [{}, {"norm_epsilon": 1e-3, "apply_layernorm_1p": False}])
def test_names_since_core_0_16(before: dict[str, Any]) -> None:
    """The old names may lie beside the new ones, from an older checkpoint; nothing reads them."""
    said = vars(sources.megatron_args(tiny.NEMOTRON))
    del said["norm_epsilon"], said["apply_layernorm_1p"]
    said |= {"layernorm_epsilon": 1e-2, "layernorm_zero_centered_gamma": True, **before}
    fields = model_fields(of_args(said, "args"), 101)
    assert (fields["layernorm_epsilon"], fields["layernorm_zero_centered_gamma"]) == (1e-2, True)
    ours = vars(megatron_lm_args(replace(tiny.NEMOTRON, layernorm_epsilon=1e-2)))
    assert ours["norm_epsilon"] == ours["layernorm_epsilon"] == 1e-2
    assert ours["apply_layernorm_1p"] is ours["layernorm_zero_centered_gamma"] is True
    said |= {"normalization": "RMSNorm"}
    with pytest.raises(ValueError, match=r"has this layernorm_zero_centered_gamma|normalization"):
        match_family(of_args(said, "args"), model_fields(of_args(said, "args"), 101))


def test_fused_gelu_is_the_tanh_one() -> None:
    def activation(**over: Any) -> str:
        stated = of_core(sources.core_fields(tiny.GPT2, **over), "yaml")
        return str(model_fields(stated, 101)["activation"])

    gelu = {"_target_": "torch._C._nn.gelu", "_call_": False}
    assert activation(activation_func=gelu) == "gelu"
    assert activation(activation_func=gelu, bias_activation_fusion=True) == "gelu_tanh"
    assert activation(activation_func={**gelu, "approximate": "tanh"}) == "gelu_tanh"


def test_windows_and_nemo1() -> None:
    def windows(size: object, skips: object = None) -> object:
        said = sources.core_fields(LLAMA, window_size=size, window_attn_skip_freq=skips)
        return model_fields(of_core(said, "yaml"), 101)["window_size"]

    assert windows([-1, 0]) is windows(None) is None
    assert windows([4095, 0]) == [4096] * 4
    assert windows((7, 0), [1, 0, 0, 1]) == [8, 0, 0, 8]
    assert windows([7, 0], 2) == [8, 0, 8, 0]
    with pytest.raises(ValueError, match=r"yaml: window_size=\[4096, 4\] is not supported"):
        windows([4096, 4])
    for over, says in (
        ({"mcore_gpt": False}, "mcore_gpt=False is not supported; only true"),
        ({"activation": ["gelu"]}, r"activation=\['gelu'\] is not supported; only"),
        ({"activation": "reglu"}, "activation=reglu is not supported; only"),
        ({"normalization": "none"}, "normalization=none is not supported"),
        ({"transformer_block_type": "post_ln"}, "transformer_block_type=post_ln"),
    ):
        with pytest.raises(ValueError, match=says):
            of_nemo1(sources.nemo1_config(LLAMA, **over), "nemo")


# ---------------------------------------------------------------- nothing runs


class Evil:
    """Runs code when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.write_text, (self.path, "was here"))


def test_no_code_of_a_pickle_runs(lm: Path, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    args = sources.megatron_args(LLAMA, extra=[Evil(trace)], function=torch.nn.functional.silu)
    torch.save({"args": args, "optimizer": {"step": torch.ones(3)}}, lm / "common.pt")
    found = read_torch_file(whole(lm / "common.pt"))
    assert isinstance(found["args"].extra[0], Inert)
    assert found["args"].params_dtype == torch.bfloat16
    assert torch.equal(found["optimizer"]["step"].read(), torch.ones(3))
    assert open_source(str(lm)).config.hidden_size == LLAMA.hidden_size
    (lm / ".metadata").write_bytes(pickle.dumps(Evil(trace)))
    refuses(lm, ".metadata is missing or damaged", "not checkpoint metadata")
    assert not trace.exists()


def test_metadata_is_what_torch_reads(weights: Path) -> None:
    with (weights / ".metadata").open("rb") as file:
        theirs = pickle.load(file)
    ours = read_metadata(whole(weights / ".metadata"))
    assert ours.state_dict_metadata == theirs.state_dict_metadata
    assert ours.storage_data == theirs.storage_data


def test_tensors_of_a_torch_file(tmp_path: Path) -> None:
    """Views and transposed tensors too, and from the middle of another file."""
    base = torch.arange(24, dtype=torch.bfloat16).view(4, 6)
    tensors = {"whole": base, "view": base[1:3, 2:], "turned": base.t(), "none": base[:0]}
    torch.save({"nested": tensors}, tmp_path / "file.pt")
    data = (tmp_path / "file.pt").read_bytes()
    (tmp_path / "big").write_bytes(b"x" * 7 + data + b"y" * 5)
    found = read_torch_file(Part(tmp_path / "big", 7, len(data)))["nested"]
    for name, tensor in tensors.items():
        assert found[name].shape == tensor.shape
        assert torch.equal(found[name].read(), tensor), name
    assert torch.equal(found["whole"].read_rows(1, 3), base[1:3])
    assert found["view"].read_rows is None
    (tmp_path / "old.pt").write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(Exception, match="not a zip file"):
        read_torch_file(whole(tmp_path / "old.pt"))


def test_json_is_read_as_bytes(tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_text(json.dumps({"a": 0, "b": 7}))
    assert vocabulary_size(tokenizer_files(tmp_path)) == 8
    assert vocabulary_size(tokenizer_files(tmp_path / "none")) is None
    assert special_ids(tokenizer_files(tmp_path)) == {}
