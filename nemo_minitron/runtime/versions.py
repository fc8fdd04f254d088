"""Whether the installed packages are of the versions that this one was tested with.

``python -m nemo_minitron.runtime.versions`` prints what is needed and what is there, tries to
import what is used, and exits with 1 if anything does not fit. It reads no model and needs no GPU:
it is meant for the build of a container image, and for whoever installed without dependencies.

The ranges are those of ``pyproject.toml``, read from the metadata of the installed package.
"""

import importlib
import logging
import platform
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from nemo_minitron.runtime import extensions
from nemo_minitron.runtime.console import show_table
from nemo_minitron.runtime.extensions import version_of

log = logging.getLogger(__name__)

PACKAGE = "nemo_minitron"
MEGATRON = "megatron-core"
PARTS = {
    "lightning": "lightning.pytorch",
    "nemo: ModelPT": "nemo.core.classes",
    "nemo: SaveRestoreConnector": "nemo.core.connectors.save_restore_connector",
    "nemo: exp_manager": "nemo.utils.exp_manager",
    "nemo: CallbackGroup": "nemo.lightning.callback_group",
    "megatron.core": "megatron.core.models.gpt.gpt_model",
    "this package": "nemo_minitron.models.distill",
}
"""What is used of the larger packages -> module that is imported to see whether it works.

The metadata of a container image may name a package that is not there, and NeMo is installed there
without what its speech models depend on; an import tells.
"""


@dataclass(frozen=True)
class Finding:
    """One line of the table.

    Attributes:
        name: package, or the part of one that was imported.
        needed: range of versions, empty if any will do.
        found: version, or what an import said.
        fits: whether that is good enough.
    """

    name: str
    needed: str
    found: str
    fits: bool


def requirements() -> list[Requirement]:
    """List the requirements of this package under the running Python, without extras."""
    try:
        texts = metadata.requires(PACKAGE) or []
    except metadata.PackageNotFoundError:  # imported from a folder, never installed
        return []
    wanted = [Requirement(text) for text in texts]
    return [r for r in wanted if r.marker is None or r.marker.evaluate({"extra": ""})]


def check_megatron() -> None:
    """Refuse a Megatron-Core that is missing or too old; warn of one newer than the tested ones.

    Raises:
        ValueError: Megatron-Core is not installed, or older than the oldest that was tested.
    """
    needed = next((r.specifier for r in requirements() if r.name == MEGATRON), SpecifierSet())
    found = version_of(MEGATRON)
    install = f"pip install '{MEGATRON}{needed}' (docs/versions.md)"
    if found is None:
        raise ValueError(f"{MEGATRON} is not installed, and this stage needs it: {install}")
    if needed.contains(found, prereleases=True):
        return
    limits = [Version(s.version).release for s in needed if s.operator.startswith("<")]
    if any(Version(found).release >= limit for limit in limits):
        log.warning(
            "%s %s is newer than the versions that were tested (%s); results may be wrong without "
            "an error. To be sure, %s",
            MEGATRON,
            found,
            needed,
            install,
        )
        return
    raise ValueError(f"{MEGATRON} {found} is installed, and {needed} is needed: {install}")


def findings() -> Iterator[Finding]:
    """Python, every package that is needed, what Megatron uses if it is there, and the imports."""
    if version_of(PACKAGE) is None:
        yield Finding(PACKAGE, "installed", "imported from a folder: no ranges to compare", False)
    else:
        python = SpecifierSet(metadata.metadata(PACKAGE)["Requires-Python"])
        running = platform.python_version()
        yield Finding("Python", str(python), running, python.contains(running, prereleases=True))
    for needed in sorted(requirements(), key=lambda r: r.name.lower()):
        found = version_of(needed.name)
        fits = found is not None and needed.specifier.contains(found, prereleases=True)
        yield Finding(needed.name, str(needed.specifier), found or "not installed", fits)
    for name, package in (("Transformer Engine", "transformer-engine"), ("apex", "apex")):
        yield Finding(name, "used if there", version_of(package) or "not installed", True)
    yield from _imports()


def _imports() -> Iterator[Finding]:
    try:
        extensions.before_megatron()  # without a GPU, Transformer Engine cannot be imported
    except ValueError as error:
        yield Finding("Transformer Engine", "imports", str(error), False)
        return
    for name, module in PARTS.items():
        try:
            importlib.import_module(module)
        except Exception as error:
            yield Finding(name, "imports", f"{type(error).__name__}: {error}", False)
        else:
            yield Finding(name, "imports", "yes", True)


def main() -> int:
    """Print the table; 1 if something does not fit."""
    found = list(findings())
    rows = [(f.name, f.needed, f.found, "yes" if f.fits else "no") for f in found]
    show_table(f"Versions for {PACKAGE}", ("package", "needed", "found", "fits"), rows)
    wrong = [f"{f.name} {f.needed}: {f.found}" for f in found if not f.fits]
    if wrong:
        sys.stderr.write(f"{len(wrong)} of {len(found)} do not fit: {'; '.join(wrong)}\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
