# Every target works in a fresh clone; only Python 3.10-3.12 with venv is needed.
#
#   make setup PYTHON=python3.12 CONSTRAINTS=   another Python, the newest versions allowed
#   make setup TORCH="--index-url URL torch"    torch from another package index (CPU, CUDA 12.x)

PYTHON ?= python3
TORCH ?= torch
CONSTRAINTS ?= requirements/tested.txt

WORKERS ?= 2

BIN := .venv/bin
INSTALLED := .venv/.installed
# Containers like to set this one; without bytecode every process compiles torch and Megatron anew.
unexport PYTHONDONTWRITEBYTECODE
# Compiling 20,000 modules ahead would double the time; Python compiles what it imports.
PIP = $(BIN)/python -m pip install --no-compile $(addprefix -c ,$(CONSTRAINTS))

.PHONY: help setup slurm quickstart test lint format docs site look pins release-check clean distclean

help:
	@echo "make setup       .venv with the package in it (.venv/bin/minitron)"
	@echo "make quickstart  prune and distill SmolLM2-135M on this machine"
	@echo "make test        all tests"
	@echo "make slurm       SLURM for the tests that need one, by apt-get, as root"
	@echo "make lint        ruff, mypy, shellcheck, hadolint"
	@echo "make format      let ruff rewrite files"
	@echo "make docs        write docs/keys.md and docs/families.md from the code"
	@echo "make site        build/site, the documentation as web pages"
	@echo "make look        look at build/site in headless Chromium (apt-get install chromium-driver)"
	@echo "make pins        write requirements/tested.txt from .venv"
	@echo "make release-check   build, check and install the package, and run it from there"
	@echo "make clean       remove results and caches; distclean: .venv and downloads too"

setup: $(INSTALLED)

# torch goes first and alone: whichever build is chosen, what follows then finds it installed.
$(INSTALLED): pyproject.toml setup.py $(CONSTRAINTS)
	$(PYTHON) -m venv .venv
	$(PIP) $(TORCH)
	$(PIP) -e ".[dev,docs]"
	@touch $@

quickstart: setup
	$(BIN)/python scripts/quickstart_assets.py .quickstart
	$(BIN)/minitron pipeline experiment=quickstart

# Tests marked slurm start one on the loopback. Where it is not and cannot be installed they are
# skipped and say so, or fail if MINITRON_SLURM=required.
SLURM := slurmctld slurmd slurm-client munge
slurm:
	@if PATH="$$PATH:/usr/sbin" command -v slurmctld >/dev/null; then exit 0; fi; \
	if [ "$$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then \
	  echo "make slurm: no SLURM here, and apt-get as root is what would install it: apt-get install $(SLURM)"; \
	  exit 0; fi; \
	export DEBIAN_FRONTEND=noninteractive; \
	apt-get update -q && apt-get install -y -q --no-install-recommends $(SLURM)

# Tests that measure seconds come last and alone.
test: setup slurm
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -m "not alone"
	$(BIN)/python -m pytest -m alone

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/hadolint docker/*Dockerfile
	$(BIN)/shellcheck --external-sources .ci/run launch/lib.sh launch/*.sbatch

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: setup
	$(BIN)/python scripts/config_docs.py docs/keys.md
	$(BIN)/python scripts/families_docs.py docs/families.md

site: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

look: site
	$(BIN)/python scripts/look_at_site.py build/site build/screenshots

pins: setup
	@sed '/^[^#]/d' requirements/tested.txt > requirements/tested.txt.new
	$(BIN)/python -m pip freeze --exclude-editable | sed '/^#/d; s/+[a-z0-9.]*$$//' >> requirements/tested.txt.new
	@mv requirements/tested.txt.new requirements/tested.txt

# dist/ is what would be uploaded; the wheel is installed into an environment of its own and run.
release-check: setup
	rm -rf dist
	$(BIN)/python -m build --outdir dist .
	$(BIN)/twine check --strict dist/*
	MINITRON_WHEEL="$(CURDIR)/dist" $(BIN)/python -m pytest -q tests/e2e/test_wheel.py

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .quickstart/run
	find nemo_minitron tests scripts -name __pycache__ -prune -exec rm -rf {} +

distclean: clean
	rm -rf .venv .quickstart
