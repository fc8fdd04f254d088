"""Keeps NeMo, Megatron and Lightning from talking over our own output."""

import logging
import warnings

_LOGGERS = (
    "megatron",
    "megatron_fsdp",
    "lightning",
    "lightning.pytorch",
    "pytorch_lightning",
    "nv_one_logger",
    "torch.distributed",
    "torch.utils",
)


def before_imports() -> None:
    """Call before NeMo or Megatron is imported: both warn and log while they are imported."""
    warnings.filterwarnings("ignore", module=r"(megatron|nemo|lightning|torch|nv_one_logger)\b")
    warnings.filterwarnings("ignore", message=r".*\.grad attribute of a Tensor that is not a leaf")
    warnings.filterwarnings("ignore", message=r"Please use DTensor instead")
    for name in _LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)


def after_imports() -> None:
    """Call once NeMo is imported: it has a logger of its own kind, and telemetry.

    The telemetry leaves ``onelogger.*`` in the current folder and, where one training failed,
    refuses the next one of the same process.
    """
    from nemo.lightning.callback_group import CallbackGroup
    from nemo.utils import logging as nemo_logging

    nemo_logging.setLevel(nemo_logging.ERROR)
    CallbackGroup.get_instance().callbacks.clear()
