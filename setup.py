"""Package layout; the metadata is in pyproject.toml.

``conf/`` lives at the top of the repository, where people look for it, and is installed as the
folder ``nemo_minitron/conf`` of the package (see ``nemo_minitron/config/schema.py::conf_dir``).
"""

from pathlib import Path

from setuptools import find_packages, setup

CONF = Path("conf")
folders = [CONF, *sorted(p for p in CONF.rglob("*") if p.is_dir() and any(p.rglob("*.yaml")))]
conf_packages = {"nemo_minitron." + ".".join(p.parts): p.as_posix() for p in folders}

setup(
    packages=[*find_packages(include=["nemo_minitron", "nemo_minitron.*"]), *conf_packages],
    package_dir=conf_packages,
    package_data={
        "nemo_minitron.reporting": ["templates/*"],
        **{name: ["*.yaml"] for name in conf_packages},
    },
)
