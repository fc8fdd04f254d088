"""``minitron finetune`` beside the training loop of Megatron-LM itself.

``MEGATRON_LM=/path/to/Megatron-LM python -m benchmarks.beside_megatron_lm`` from the repository
root, with a checkout of core 0.19; about seven minutes on two cores. Both train a model of the same
sizes on the same ``.bin``/``.idx`` pair, at the same layout, with the same optimizer and the same
number of micro-batches, in fp32 with gloo; a step of one follows a step of the other
(``benchmarks/beside.py``). ``tests/helpers/megatron_lm.py`` answers what Megatron-LM asks of CUDA.
Exit status 1 when a step or the peak of the memory is more than 1.05 of Megatron-LM's.
"""

import os
import platform
import socket
import sys
from pathlib import Path

from benchmarks.beside import UNSEEN, Loop, compare, report
from benchmarks.marked import MARK, minitron
from nemo_minitron.config.model import ModelConfig

LIMIT = 1.05
RANKS = 2
MODEL = ModelConfig(
    family="llama",
    num_layers=12,
    hidden_size=1024,
    ffn_hidden_size=2816,
    num_attention_heads=16,
    num_query_groups=8,
    kv_channels=64,
    vocab_size=32768,
    max_position_embeddings=256,
    share_embeddings_and_output_weights=False,
)
SEQ, MICRO, BATCH = 256, 1, 2
LAYOUTS = {
    "TP2": ("parallel.tensor_model_parallel_size=2", "--tensor-model-parallel-size 2"),
    "PP2": ("parallel.pipeline_model_parallel_size=2", "--pipeline-model-parallel-size 2"),
}
THEIRS = f"""--num-layers {MODEL.num_layers} --hidden-size {MODEL.hidden_size}
    --ffn-hidden-size {MODEL.ffn_hidden_size} --num-attention-heads {MODEL.num_attention_heads}
    --group-query-attention --num-query-groups {MODEL.num_query_groups}
    --max-position-embeddings {SEQ} --seq-length {SEQ}
    --swiglu --normalization RMSNorm --disable-bias-linear --position-embedding-type rope
    --untie-embeddings-and-output-weights --attention-dropout 0 --hidden-dropout 0
    --tokenizer-type NullTokenizer --vocab-size {MODEL.vocab_size - 1}
    --make-vocab-size-divisible-by 64 --micro-batch-size {MICRO} --global-batch-size {BATCH}
    --split 100,0,0 --eval-iters 0 --eval-interval 1000 --log-interval 1
    --lr 1e-4 --lr-decay-style constant
    --weight-decay 0.1 --adam-beta2 0.95 --clip-grad 1.0 --use-distributed-optimizer
    --calculate-per-token-loss
    --use-cpu-initialization --distributed-backend gloo --num-workers 0 --transformer-impl local
    --no-gradient-accumulation-fusion --no-masked-softmax-fusion --no-persist-layer-norm
    --no-bias-dropout-fusion --no-rope-fusion --attention-backend unfused"""
ONE_THREAD = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
_ROOT = Path(__file__).resolve().parents[1]


def ranks(arguments: list[str]) -> int:
    """Fork the ranks of ``minitron`` from one process that imports, as those of Megatron-LM are."""
    import nemo_minitron.models.training  # noqa: F401

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for number in range(RANKS):
        child = os.fork()
        if child == 0:
            own = {"RANK": number, "LOCAL_RANK": number, "MASTER_PORT": port}
            own |= {"WORLD_SIZE": RANKS, "LOCAL_WORLD_SIZE": RANKS}
            os.environ.update({key: str(value) for key, value in own.items()})
            os.environ["MASTER_ADDR"] = "127.0.0.1"
            os._exit(minitron(arguments))
        children.append(child)
    return max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children)


def loops(layout: str, work: Path, steps: int) -> tuple[Loop, Loop]:
    """Ours and Megatron-LM's."""
    key, flags = LAYOUTS[layout]
    total = UNSEEN + steps + 2  # what comes after the last step is not to begin
    ours = ["finetune", f"checkpoint={work}/model", f"data.path={work}/tokens", "data.split='1'"]
    ours += [f"data.seq_length={SEQ}", f"data.micro_batch_size={MICRO}", key]
    ours += [f"data.global_batch_size={BATCH}", f"output_dir={work}/{layout}", "optim.lr=1e-4"]
    ours += ["optim.lr_decay_style=constant", f"trainer.max_steps={total}"]
    ours += ["trainer.limit_val_batches=0", "trainer.save_every_n_steps=0"]
    tree = os.environ["MEGATRON_LM"]
    theirs = ["tests.helpers.megatron_lm", str(RANKS), f"{work}/{layout}-batches"]
    theirs += [f"{tree}/pretrain_gpt.py", *THEIRS.split(), *flags.split()]
    theirs += ["--data-path", f"{work}/tokens", "--train-iters", str(total)]
    theirs += ["--data-cache-path", f"{work}/cache"]
    start = [sys.executable, "-m"]
    environment = {**ONE_THREAD, "PYTHONPATH": str(_ROOT)}
    return (
        Loop([*start, "benchmarks.beside_megatron_lm", "--ranks", *ours], MARK, environment,
             work / f"{layout}-ours.log"),
        Loop([*start, *theirs], "elapsed time per iteration", environment,
             work / f"{layout}-theirs.log"),
    )  # fmt: skip


def rows(work: Path, steps: int) -> tuple[list[list[str]], bool]:
    """The table, and whether steps and memory are within their limit."""
    from tests.helpers.data_fixtures import write_pair
    from tests.helpers.tiny import write_result

    write_result(work / "model", MODEL, 1)
    write_pair(work / "tokens", 400 * (steps + UNSEEN + 2), MODEL.vocab_size)
    found = [compare(layout, *loops(layout, work, steps), steps) for layout in LAYOUTS]
    within = all(max(one.seconds, one.memory) <= LIMIT for _, one in found)
    return [row for row, _ in found], within


SAID = (
    "## finetune beside Megatron-LM\n\n"
    f"Megatron-LM's `pretrain_gpt.py` (core 0.19) and `minitron finetune`: {MODEL.num_layers} "
    f"layers of hidden size {MODEL.hidden_size:,} and {MODEL.ffn_hidden_size:,}, vocabulary "
    f"{MODEL.vocab_size:,}, {BATCH // MICRO} micro-batches of {SEQ} tokens, distributed Adam, "
    f"fp32, {RANKS} ranks of one thread with gloo ({platform.machine()}). NeMo and Lightning take "
    "0.1 GB of a process, which is more than a twentieth of a model of a few million parameters."
)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--ranks"]:
        sys.exit(ranks(sys.argv[2:]))
    sys.exit(report("beside_megatron_lm", rows, ("layout", "Megatron-LM", "finetune"), SAID))
