"""Package layout; the metadata is in pyproject.toml.

``conf/`` and ``launch/`` live at the top of the repository, where people look for them, and are
installed as the folders ``nemo_minitron/conf`` and ``nemo_minitron/launch`` of the package (see
``config/schema.py::conf_dir`` and ``pipeline/submit.py::home``).
"""

from pathlib import Path

from setuptools import find_packages, setup

CONF = Path("conf")
folders = [CONF, *sorted(p for p in CONF.rglob("*") if p.is_dir() and any(p.rglob("*.yaml")))]
conf = {"nemo_minitron." + ".".join(p.parts): p.as_posix() for p in folders}
beside = {**conf, "nemo_minitron.launch": "launch"}

setup(
    packages=[*find_packages(include=["nemo_minitron", "nemo_minitron.*"]), *beside],
    package_dir=beside,
    package_data={
        "nemo_minitron": ["py.typed", "*.pyi"],
        "nemo_minitron.reporting": ["templates/*"],
        **{name: ["*.yaml"] for name in conf},
        "nemo_minitron.launch": ["*.sbatch", "lib.sh", "README.md"],
    },
)
