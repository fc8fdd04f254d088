"""Optional compiled packages, looked at before Megatron-Core is imported.

Megatron uses Transformer Engine and apex where they can be imported, and takes only an
``ImportError`` for an answer. An installation that is not whole (``pip install
transformer-engine[core]`` brings no extension for torch; a library of CUDA may be missing) raises
something else, which would end ``import megatron.core`` with a message about a file that nobody
asked for. Without CUDA even a whole installation is of no use: Megatron would take its optimizer
and fail at the first step.
"""

import importlib
import logging
import sys
import warnings
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

from packaging.version import Version

from nemo_minitron.runtime.ranks import rank

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Extension:
    """A package that Megatron uses where it is there.

    Attributes:
        package: name of the module that says whether the package is there.
        title: what people call it.
        parts: modules that fail to import where the package is not whole.
        required: whether a GPU run stops where the package is there but broken; otherwise the run
            goes on without it.
        oldest: the oldest version that the supported versions of Megatron-Core ask for.
        repair: how to complete or remove the package.
        needs_cuda: whether the package is of no use without CUDA.
        refuses_older: whether ``import megatron.core`` itself fails beside an older version.
    """

    package: str
    title: str
    parts: tuple[str, ...]
    required: bool
    oldest: str | None
    repair: str
    needs_cuda: bool = True
    refuses_older: bool = False


EXTENSIONS = (
    Extension(
        "transformer_engine",
        "Transformer Engine",
        ("transformer_engine.pytorch",),
        required=True,
        oldest="2.9.0a0",
        repair=(
            "complete it (pip install --no-build-isolation transformer-engine[pytorch]) or remove "
            "it (pip uninstall transformer-engine transformer-engine-cu12 transformer-engine-cu13 "
            "transformer-engine-torch)"
        ),
    ),
    Extension(
        "apex",
        "apex",
        ("apex.optimizers", "apex.multi_tensor_apply", "amp_C"),
        required=False,
        oldest=None,
        repair="build it with its CUDA extensions or remove it (pip uninstall apex)",
    ),
    Extension(
        "nvidia_resiliency_ext",
        "nvidia-resiliency-ext",
        ("nvidia_resiliency_ext",),
        required=False,
        oldest="0.6.0",
        repair="install 0.6.0 or later, or remove it (pip uninstall nvidia-resiliency-ext)",
        needs_cuda=False,
        refuses_older=True,
    ),
)


@cache
def before_megatron() -> None:
    """Call before anything of Megatron-Core is imported, wherever this package imports it.

    Without CUDA the optional packages are set aside: Megatron, and all else in this process, finds
    them not installed. With CUDA the ones that are there are imported, which Megatron does anyway.
    Where the program has imported Megatron itself nothing is done.

    Raises:
        ValueError: Transformer Engine is installed on a machine with CUDA, but does not work.
    """
    if "megatron.core" in sys.modules:  # the process has gone past the point already
        return
    for extension in EXTENSIONS:
        if _is_there(extension):
            _settle(extension)


def _is_there(extension: Extension) -> bool:
    if extension.package in sys.modules:
        return sys.modules[extension.package] is not None
    return find_spec(extension.package) is not None


def _settle(extension: Extension) -> None:
    if all(part in sys.modules for part in extension.parts):  # the user's program uses it
        return
    if extension.refuses_older:
        found = _version(extension)
        if found is None or found < Version(extension.oldest or "0"):
            reason = f"{found or '(no version)'} is older than {extension.oldest}"
            _set_aside(extension, reason, extension.repair)
            return
    import torch

    if extension.needs_cuda and not torch.cuda.is_available():
        _set_aside(extension, "is installed, but it needs CUDA, which this machine does not have")
        return
    try:
        for part in extension.parts:
            importlib.import_module(part)
    except Exception as error:
        reason = f"is installed but does not work ({type(error).__name__}: {error})"
        if extension.required:
            raise ValueError(
                f"{extension.title} {reason}; Megatron-Core cannot run beside it: "
                f"{extension.repair}"
            ) from error
        _set_aside(extension, reason, extension.repair)
        return
    _check_age(extension)


def _set_aside(extension: Extension, reason: str, repair: str = "") -> None:
    """Make every later import of the package fail as if it were not installed."""
    for name in list(sys.modules):
        if name.split(".")[0] == extension.package:
            del sys.modules[name]
    sys.modules[extension.package] = None  # type: ignore[assignment]  # None ends its import
    if rank() == 0:
        log.warning(
            "%s %s; Megatron-Core runs without it%s",
            extension.title,
            reason,
            f". To mend that, {repair}" if repair else "",
        )


def _check_age(extension: Extension) -> None:
    found = _version(extension)
    if found is None:  # built in place
        return
    if extension.oldest and found < Version(extension.oldest) and rank() == 0:
        log.warning(
            "%s %s is older than %s, the oldest that Megatron-Core asks for; what it lacks may end "
            "a run: install a newer one",
            extension.title,
            found,
            extension.oldest,
        )


def _version(extension: Extension) -> Version | None:
    """Return the version of the installed package, whose name on the index has dashes."""
    found = version_of(extension.package.replace("_", "-"))
    return None if found is None else Version(found)


_LOGGERS = (
    "megatron",
    "megatron_fsdp",
    "lightning",
    "lightning.fabric",
    "lightning.pytorch",
    "pytorch_lightning",
    "nv_one_logger",
    "torch.distributed",
    "torch.utils",
)


def version_of(package: str) -> str | None:
    """Return the installed version of a package, None if it is not installed."""
    with suppress(PackageNotFoundError):
        return version(package)
    return None


_CALLBACKS = "nemo.lightning.callback_group"
_asked: list[bool] = []


def be_quiet() -> None:
    """Say that this process is the command line's, which shows neither warnings nor telemetry.

    NeMo and Megatron warn and log while they are imported, so call it before they are. A program
    that imports this package as a library keeps its own loggers, warnings and callbacks.
    """
    _asked.append(True)
    warnings.filterwarnings("ignore", module=r"(megatron|nemo|lightning|torch|nv_one_logger)\b")
    warnings.filterwarnings("ignore", message=r".*\.grad attribute of a Tensor that is not a leaf")
    warnings.filterwarnings("ignore", message=r"Please use DTensor instead")
    _quiet_loggers()
    if _CALLBACKS in sys.modules:
        _quiet_nemo()


def nemo_imported() -> None:
    """Call once NeMo is imported: the command line wants it quiet, too."""
    if _asked:
        _quiet_loggers()  # Lightning has set levels of its own while it was imported
        _quiet_nemo()


def _quiet_loggers() -> None:
    for name in _LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)


def _quiet_nemo() -> None:
    """Keep NeMo's own logger and its telemetry quiet.

    The telemetry leaves ``onelogger.*`` in the current folder and, where one training failed,
    refuses the next one of the same process.
    """
    from nemo.lightning.callback_group import CallbackGroup

    # NeMo's own setLevel would change handlers, too, which other loggers may share.
    logging.getLogger("nemo_logger").setLevel(logging.ERROR)
    CallbackGroup.get_instance().callbacks.clear()
