"""Write the page of model families from their parameter tables.

    python scripts/families_docs.py docs/families.md

``tests/unit/test_repo.py`` fails while the page and the tables differ.
"""

import sys
from pathlib import Path

from nemo_minitron.config.axes import AXES, SETTINGS
from nemo_minitron.families.dims import DIMS
from nemo_minitron.families.registry import FAMILIES, UNSUPPORTED
from nemo_minitron.families.table import Family, Row

HEAD = """\
# Model families

Written by `make docs` from the tables in `nemo_minitron/families/`; do not edit.
[adding-a-family.md](adding-a-family.md) says how to add one.

A model is opened by the `architectures` entry of its `config.json`, with which `model_type` has to
agree. What a table cannot hold is refused when it is opened, naming the field; so is a field that
no mapping knows, unless it is null or `source_ignore` names it. Sizes that can be pruned are the
keys `pruning.target.<size>`; layers can also be named (`pruning.drop_layers`).
"""
TABLES = """\
## Tables

One row per parameter: its Megatron-Core name, what each dim holds, the dim that tensor parallelism
splits, its Hugging Face name. `qkv` are the rows of query, key and value interleaved per query
group, `gate_up` are gate and up one after the other. Several Hugging Face names are fused; one
that is stored in another order has its form in brackets. A letter in brackets says which layers
have it, where they differ: `M` Mamba-2, `*` attention, `G` a gated delta net, `-` an MLP, `E`
experts.
"""


def page() -> str:
    """Text of ``docs/families.md``."""
    parts = [
        HEAD,
        "| family | models | architectures | sizes that can be pruned |\n|---|---|---|---|",
    ]
    parts += [_overview(family) for family in FAMILIES.values()]
    parts.append("\n## What is refused, and why\n")
    parts += [_refused(family) for family in FAMILIES.values()]
    parts.append("Not opened at all:\n")
    parts += [f"- `{name}`: {why}." for name, why in UNSUPPORTED.items()]
    parts += ["", TABLES]
    parts += [_table(family) for family in FAMILIES.values()]
    return "\n".join(parts)


def prunable(family: Family) -> list[str]:
    """Sizes of a family's models that can be pruned, as pruning.target names them."""
    held = {axis for row in family.rows for dim in row.dims for axis in DIMS[dim].pruned_axes}
    sizes = [
        axis.size for axis in AXES.values() if axis.name in held | {"layer"} and not axis.fixed
    ]
    sizes += SETTINGS if "expert" in held else ()
    return [size for size in sizes if family.prunable is None or size in family.prunable]


def _overview(family: Family) -> str:
    names = ", ".join(f"`{name}`" for name in family.hf_architectures)
    sizes = ", ".join(f"`{name}`" for name in prunable(family))
    return f"| `{family.name}` | {family.models} | {names} | {sizes} |"


def _refused(family: Family) -> str:
    lines = [f"`{family.name}`:\n", *(f"- {item}." for item in family.refuses)]
    if family.prunable is not None:
        lines.append(f"- pruning any other size: {family.why_not_prunable}.")
    return "\n".join(lines) + "\n"


def _table(family: Family) -> str:
    lines = [
        f"### {family.name}\n",
        "| parameter | dims | split | Hugging Face |",
        "|---|---|---|---|",
    ]
    lines += [_line(row, family) for row in family.rows]
    return "\n".join(lines) + "\n"


def _line(row: Row, family: Family) -> str:
    split = "" if row.tp_dim is None else row.dims[row.tp_dim]
    form = f" ({row.hf_form})" if row.hf_form else ""
    layer = family.hf_prefix + "layers.{layer}."
    hf = ", ".join(f"`{name.removeprefix(layer)}`" for name in row.hf)
    name = row.name.replace("decoder.layers.{layer}.", "")
    kind = f" (`{row.kind}`)" if row.kind else ""
    return f"| `{name}`{kind} | {', '.join(row.dims)} | {split} | {hf}{form} |"


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(page(), encoding="utf-8")
