"""``minitron`` that prints a mark when a step is done; run as a script, with any tree on its path.

``PYTHONPATH=TREE python benchmarks/marked.py ARGUMENTS...`` runs the package of ``TREE``.
"""

import os
import sys
from typing import Any

MARK = "minitron-benchmark step"


def minitron(arguments: list[str]) -> int:
    """``minitron`` that says when a step is done."""
    from nemo_minitron.cli import main
    from nemo_minitron.models.training import History

    own: Any = History.on_train_batch_end

    def said(self: History, *args: object) -> None:
        own(self, *args)
        if os.environ.get("RANK", "0") == "0":
            print(MARK, flush=True)

    setattr(History, "on_train_batch_end", said)
    return main(arguments)


if __name__ == "__main__":
    sys.exit(minitron(sys.argv[1:]))
