"""The quick start's ``distill`` beside a plain loop of transformers with whole logits.

``python -m benchmarks.beside_transformers`` from the repository root, about twenty minutes on two
cores. Both distil a SmolLM2-135M of random weights whose MLP is 1,024 wide, on the batches of
``conf/experiment/quickstart.yaml`` (4 x 256 tokens, fp32, Adam), with the same number of threads; a
step of one follows a step of the other (``benchmarks/beside.py``). The plain loop is what one would
write: two ``LlamaForCausalLM``, the forward KL divergence of all logits, ``AdamW``, and
``torch.save`` of weights and Adam's state where it writes checkpoints. Exit status 1 when a step
takes more than 1.1 of the plain one's, or the peak of the memory more than the plain one's.
"""

import platform
import sys
from dataclasses import replace
from pathlib import Path

from benchmarks.beside import UNSEEN, Loop, compare, report
from benchmarks.distill_step import TEACHER
from benchmarks.marked import MARK

SLOWEST, LARGEST = 1.1, 1.0
THREADS = 2
STUDENT = replace(TEACHER, ffn_hidden_size=1024)
SEQ, BATCH, LR, EVERY = 256, 4, 5e-4, 3
"""``EVERY``: steps between two checkpoints, where there are some."""
_ROOT = Path(__file__).resolve().parents[1]


def plain(folder: str, steps: int, every: int) -> int:
    """A loop without this package, but for the sizes of the models."""
    import torch
    import torch.nn.functional as F
    from transformers import LlamaConfig, LlamaForCausalLM

    from nemo_minitron.families.registry import family_of

    torch.manual_seed(0)
    teacher, student = (
        LlamaForCausalLM(LlamaConfig(**family_of(config).to_hf(config)))
        for config in (TEACHER, STUDENT)
    )
    teacher.eval().requires_grad_(False)
    student.train()
    optimizer = torch.optim.AdamW(student.parameters(), LR, betas=(0.9, 0.95), weight_decay=0.1)
    ids = torch.randint(0, TEACHER.vocab_size, (steps, BATCH, SEQ))
    for number, batch in enumerate(ids, start=1):
        with torch.no_grad():
            wanted = teacher(batch, use_cache=False).logits.flatten(0, 1).log_softmax(-1)
        given = student(batch, use_cache=False).logits.flatten(0, 1).log_softmax(-1)
        loss = F.kl_div(given, wanted, log_target=True, reduction="batchmean")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()
        if every and number % every == 0:
            state = {"model": student.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save(state, f"{folder}/plain.pt")
        print(MARK, flush=True)
    return 0


def loops(work: Path, steps: int, every: int) -> tuple[Loop, Loop]:
    """Ours and the plain one; with checkpoints every so many steps, or 0 for none."""
    total = UNSEEN + steps + 2  # what comes after the last step is not to begin
    ours = ["distill", f"student={work}/student", f"teacher={work}/teacher"]
    ours += [f"data.path={work}/tokens", f"data.seq_length={SEQ}", "data.split='1'"]
    ours += [f"data.micro_batch_size={BATCH}", f"data.global_batch_size={BATCH}"]
    ours += [f"output_dir={work}/ours-{every}", f"trainer.max_steps={total}", f"optim.lr={LR}"]
    ours += ["trainer.limit_val_batches=0", f"trainer.save_every_n_steps={every}"]
    environment = {
        "OMP_NUM_THREADS": str(THREADS),
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": str(_ROOT),
    }
    theirs = [sys.executable, "-m", "benchmarks.beside_transformers", "--plain"]
    theirs += [str(work), str(total), str(every)]
    # As light a script as ``minitron`` itself: Megatron's helper process imports it once more.
    marked = [sys.executable, str(_ROOT / "benchmarks" / "marked.py"), *ours]
    return (
        Loop(marked, MARK, environment, work / f"ours-{every}.log"),
        Loop(theirs, MARK, environment, work / f"plain-{every}.log"),
    )


def rows(work: Path, steps: int) -> tuple[list[list[str]], bool]:
    """The table, and whether all of it is within its limits."""
    from tests.helpers.data_fixtures import write_pair
    from tests.helpers.tiny import write_result

    for name, config in (("teacher", TEACHER), ("student", STUDENT)):
        write_result(work / name, config, 1)
    write_pair(work / "tokens", 40 * BATCH * (steps + UNSEEN + 2), TEACHER.vocab_size)
    found = []
    for every in (0, EVERY):
        name = f"every {every} steps" if every else "none"
        found.append(compare(name, *loops(work, steps, every), steps))
    within = all(one.seconds <= SLOWEST and one.memory <= LARGEST for _, one in found)
    return [row for row, _ in found], within


SAID = (
    "## distill beside a plain loop\n\n"
    f"SmolLM2-135M as the teacher of itself with an MLP of {STUDENT.ffn_hidden_size:,}, random "
    f"weights, {BATCH} x {SEQ} tokens a step, fp32, {THREADS} threads ({platform.machine()}): "
    "`minitron distill`, and a loop of transformers that holds all logits."
)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--plain"]:
        sys.exit(plain(sys.argv[2], int(sys.argv[3]), int(sys.argv[4])))
    sys.exit(report("beside_transformers", rows, ("checkpoints", "transformers", "distill"), SAID))
