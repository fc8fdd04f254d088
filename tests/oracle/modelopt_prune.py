"""The oracle: ModelOpt 0.43.0 prunes Megatron models on the CPU. Runs in an environment of its own.

``python modelopt_prune.py FOLDER``; nothing of this project is imported. ``FOLDER/job.json``::

    {"pipeline_model_parallel_size": 1, "models": {NAME: {
        "config": {sizes and switches of nemo_minitron's ModelConfig},
        "weights": "path of a .safetensors file, global Megatron names (local spec)",
        "tokens": "path of a .npy of token ids [samples, s]; one forward call per sample",
        "targets": {TARGET: {Megatron size: value}}}}}

Every pipeline rank R writes what it holds, with layers numbered from 0 over the whole model:

- ``NAME.scores.R.safetensors``: ``layer`` and ``hidden`` (rank 0), ``ffn.LAYER``, ``head.LAYER``;
- ``NAME.TARGET.R.safetensors``: the pruned weights, channels in ModelOpt's rank order;
- ``NAME.TARGET.R.json``: kept indices in rank order: ``layers`` (ascending), ``hidden``,
  ``ffn`` and ``head`` by layer of the pruned model.
"""

import contextlib
import functools
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

_ACTIVATIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
    "squared_relu": lambda x: F.relu(x).square(),
}
_SAME_IN_MEGATRON = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "kv_channels",
    "normalization",
    "layernorm_epsilon",
    "gated_linear_unit",
    "add_bias_linear",
    "add_qkv_bias",
)


# ------------------------------------------------ what ModelOpt and Megatron need on a CPU


def patch_for_cpu() -> None:
    """CUDA calls that ModelOpt and Megatron make unasked, answered by the CPU."""
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    gather = dist.all_gather_into_tensor

    def all_gather_into_tensor(output: Tensor, tensor: Tensor, **kwargs: Any) -> Any:
        return gather(output, tensor.reshape(-1), **kwargs)  # gloo refuses 0-dim tensors

    torch.Tensor.cuda = lambda self, *args, **kwargs: self
    torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment,return-value]  # a device in place of a number
    CudaRNGStatesTracker.fork = lambda self, *args, **kwargs: contextlib.nullcontext()
    dist.all_gather_into_tensor = all_gather_into_tensor  # type: ignore[assignment]  # fewer arguments


def register_torch_norms() -> None:
    """Teach ModelOpt the local spec's torch norms; it knows only apex's and TE's."""
    from modelopt.torch.nas.modules.norm import _DynamicLayerNorm
    from modelopt.torch.nas.registry import DMRegistry

    class DynamicTorchNorm(_DynamicLayerNorm):
        def _setup(self, *, num_features: Any) -> None:
            self._register_hparam("num_features", num_features)
            for name in ("weight", "bias"):
                if getattr(self, name, None) is not None:
                    self._register_dynamic_attribute(name, self._cut_to_active_features)
            self._register_dynamic_attribute("normalized_shape", self._get_normalized_shape)

    DMRegistry.unregister(nn.LayerNorm)
    names = {nn.LayerNorm: "nn.LayerNorm", nn.RMSNorm: "nn.RMSNorm"}
    DMRegistry.register(names)(DynamicTorchNorm)


# ------------------------------------------------ the model


def build(config: dict[str, Any], pp: int) -> nn.Module:
    """Stock Megatron ``GPTModel`` of this pipeline rank, local spec, weights uninitialised."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.transformer_config import TransformerConfig

    mcore = TransformerConfig(
        **{key: config[key] for key in _SAME_IN_MEGATRON},
        activation_func=_ACTIVATIONS[config["activation"]],
        hidden_dropout=0.0,
        attention_dropout=0.0,
        pipeline_model_parallel_size=pp,
        pipeline_dtype=torch.float32,
        perform_initialization=False,
        use_cpu_initialization=True,
        masked_softmax_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        gradient_accumulation_fusion=False,
        apply_rope_fusion=False,
        persist_layer_norm=False,
    )
    assert not config["rope_scaling"], "the oracle has no rope_scaling"
    rank = dist.get_rank()
    return GPTModel(
        config=mcore,
        transformer_layer_spec=get_gpt_layer_local_spec(normalization=config["normalization"]),
        vocab_size=config["vocab_size"],
        max_sequence_length=config["max_position_embeddings"],
        pre_process=rank == 0,
        post_process=rank == pp - 1,
        share_embeddings_and_output_weights=config["share_embeddings_and_output_weights"],
        position_embedding_type=config["position_embedding_type"],
        rotary_percent=config["rotary_percent"],
        rotary_base=int(config["rotary_base"]),
    )


def global_names(model: Any) -> dict[str, str]:
    """Local parameter name -> name in the whole model."""
    names = {}
    for name, _ in model.named_parameters():
        parts = name.split(".")
        if parts[:2] == ["decoder", "layers"]:
            parts[2] = str(model.decoder.layers[int(parts[2])].layer_number - 1)
        names[name] = ".".join(parts)
    return names


def load(model: nn.Module, weights: dict[str, Tensor], tied: bool) -> None:
    """Fill every parameter of this rank."""
    parameters = dict(model.named_parameters())
    for name, source in global_names(model).items():
        if tied and source == "output_layer.weight":
            source = "embedding.word_embeddings.weight"
        parameters[name].data.copy_(weights[source])


@torch.no_grad()
def forward_samples(model: Any, tokens: Tensor) -> None:
    """One forward pass per row of ``[samples, s]`` ids; hidden states go from stage to stage."""
    rank, last = dist.get_rank(), dist.get_world_size() - 1
    s = tokens.size(1)
    positions = torch.arange(s)[None]
    mask = torch.ones(1, 1, s, s).triu(1).bool()  # True is hidden
    for row in tokens:
        if rank > 0:
            received = torch.empty(s, 1, model.config.hidden_size)
            dist.recv(received, rank - 1)
            model.set_input_tensor(received)
        output = model(row[None], positions, mask)
        if rank < last:
            dist.send(output.contiguous(), rank + 1)


# ------------------------------------------------ pruning


def indices(hparam: Any) -> list[int]:
    """Kept indices of a hyperparameter in the order ModelOpt stores them."""
    kept = hparam.active_slice
    return list(range(kept.stop)) if isinstance(kept, slice) else kept.tolist()


@contextlib.contextmanager
def captured_orders(found: dict[str, Any]) -> Any:
    """Read the kept indices off the model after pruning: the export that follows forgets them."""
    from modelopt.torch.prune.plugins.mcore_minitron import MCoreMinitronSearcher

    prune = MCoreMinitronSearcher._prune

    def reading(self: Any, *args: Any, **kwargs: Any) -> None:
        prune(self, *args, **kwargs)
        model, count = self.model, self.model.get_hparam("num_layers").active
        layers = {layer.layer_number - 1: layer for layer in model.decoder.layers}
        found["layers"] = sorted(number - 1 for number in self.sorted_layers[:count])
        found["hidden"] = indices(model.get_hparam("hidden_size"))
        for axis, owner, name in (
            ("ffn", "mlp", "ffn_hidden_size"),
            ("head", "self_attention", "num_attention_heads"),
        ):
            found[axis] = {
                number: indices(getattr(layer, owner).get_hparam(name))
                for number, layer in layers.items()
            }

    MCoreMinitronSearcher._prune = reading
    try:
        yield
    finally:
        MCoreMinitronSearcher._prune = prune


def scores_of_rank(
    result: dict[str, Any], layers: list[int], kv_channels: int
) -> dict[str, Tensor]:
    """What ModelOpt accumulated -> its scores (it stores squares summed over calls).

    Args:
        result: what ``mtp.prune`` returned.
        layers: global numbers of this rank's layers before pruning.
        kv_channels: the model's.
    """
    per_rank = result["activations_per_rank"]
    out = {}
    if dist.get_rank() == 0:
        influence = [score for _, score in sorted(result["layer_scores"].items())]
        out["layer"] = torch.tensor(influence, dtype=torch.float64)
        norms = [norm.sqrt() for activations in per_rank for norm in activations[""].values()]
        out["hidden"] = torch.stack(norms).sum(0)
    mine = per_rank[dist.get_rank()]
    for position, number in enumerate(layers):
        prefix = f"decoder.layers.{position}"
        heads = mine[f"{prefix}.self_attention"].sqrt().view(-1, kv_channels)
        out[f"head.{number}"] = torch.linalg.vector_norm(heads, dim=1)
        out[f"ffn.{number}"] = mine[f"{prefix}.mlp"].sqrt()
    return out


def modelopt_prune(
    model: nn.Module, sizes: dict[str, int], tokens: Tensor, scores_path: Path
) -> tuple[nn.Module, dict[str, Any], dict[str, Any]]:
    """Pruned model, what ``mtp.prune`` returned beside it, and the kept indices in rank order.

    Args:
        model: this rank's part.
        sizes: Megatron size -> value after pruning.
        tokens: ``[samples, s]`` ids.
        scores_path: where ModelOpt keeps its activations; where they are there, it runs no model.
    """
    import modelopt.torch.prune as mtp

    space = mtp.mcore_minitron.get_mcore_minitron_config(
        hidden_size_divisor=1,
        ffn_hidden_size_divisor=1,
        num_moe_experts_divisor=1,
        num_layers_divisor=1,
    )
    orders: dict[str, Any] = {}
    with captured_orders(orders):
        model, result = mtp.prune(
            model,
            mode=[("mcore_minitron", space)],
            constraints={"export_config": dict(sizes)},
            dummy_input=None,
            config={
                "forward_loop": functools.partial(forward_samples, tokens=tokens),
                "scores_path": str(scores_path),
            },
        )
    return model, result, orders


def prune_model(name: str, model_job: dict[str, Any], pp: int, folder: Path) -> None:
    """All targets of one model; forward passes are made for the first one alone."""
    config, rank = model_job["config"], dist.get_rank()
    tied = config["share_embeddings_and_output_weights"]
    weights = load_file(model_job["weights"])
    tokens = torch.from_numpy(np.load(model_job["tokens"]).astype(np.int64))
    scores_path = folder / f"{name}.activations" / "scores.pth"
    for index, (target, sizes) in enumerate(model_job["targets"].items()):
        model: Any = build(config, pp)
        load(model, weights, tied)
        layers = [layer.layer_number - 1 for layer in model.decoder.layers]
        model, result, orders = modelopt_prune(model, sizes, tokens, scores_path)
        if index == 0:
            scores = scores_of_rank(result, layers, config["kv_channels"])
            save_file(scores, folder / f"{name}.scores.{rank}.safetensors")
        pruned = {
            known: model.get_parameter(local).detach().clone().contiguous()
            for local, known in global_names(model).items()
            if not (tied and known == "output_layer.weight")
        }
        save_file(pruned, folder / f"{name}.{target}.{rank}.safetensors")
        (folder / f"{name}.{target}.{rank}.json").write_text(json.dumps(orders))


def run_rank(rank: int, pp: int, folder: Path, store: str) -> None:
    """One pipeline rank: all models of the job."""
    from megatron.core import parallel_state

    file_store = dist.FileStore(store, pp)
    dist.init_process_group("gloo", store=file_store, rank=rank, world_size=pp)
    parallel_state.initialize_model_parallel(1, pp)
    patch_for_cpu()
    register_torch_norms()
    job = json.loads((folder / "job.json").read_text())
    for name, model_job in job["models"].items():
        prune_model(name, model_job, pp, folder)
    dist.destroy_process_group()


def main() -> None:
    """Start the pipeline ranks and wait for them."""
    folder = Path(sys.argv[1])
    pp = json.loads((folder / "job.json").read_text())["pipeline_model_parallel_size"]
    with tempfile.TemporaryDirectory() as scratch:
        arguments = (pp, folder, f"{scratch}/store")
        if pp == 1:
            run_rank(0, *arguments)
        else:
            mp.spawn(run_rank, arguments, nprocs=pp)


if __name__ == "__main__":
    main()
