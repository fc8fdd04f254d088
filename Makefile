# Every target works in a fresh clone; only Python 3.12 (or 3.11, 3.10) with venv is needed.
#
# Python decides on the stack: 3.12 has the newest Megatron-Core, 3.11 and 3.10 the last one that
# runs there (docs/versions.md). The newest Python that is found is taken.
#
#   make setup PYTHON=python3.11                another Python than the newest
#   make setup CONSTRAINTS=                     the newest versions allowed, not the tested ones
#   make setup TORCH="--index-url URL torch"    torch from another package index (CPU, CUDA 12.x)
#   make test VENV=.venv-other                  another folder than .venv

TORCH ?= torch
VENV ?= .venv
WORKERS ?= 2

BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

# Looked for only where there is no environment yet.
ifndef PYTHON
PYTHON := $(if $(wildcard $(BIN)/python),$(BIN)/python,$(shell sh scripts/find_python.sh 3.12 3.11 3.10))
endif
PYTHON_VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
CONSTRAINTS ?= $(wildcard requirements/tested-$(PYTHON_VERSION).txt)
STACK := $(if $(filter 3.12,$(PYTHON_VERSION)),0.19,0.16: the older stack (Python 3.12 would give 0.19))

# What the suite runs on the older stack: the unit tests but for those that meet no Megatron, torch or
# transformers at all (pipeline: through stages that the road has too), three files on several ranks,
# the road from import to export.
STACK_FREE := balance carry cluster_config completion docs docs_block examples layout make_setup \
  mutants pipeline planning planning_precision planning_teacher repo search_space step_time submit
OLDER_TESTS := tests/unit $(STACK_FREE:%=--ignore=tests/unit/test_%.py) tests/dist/test_importance_scores.py tests/dist/test_distillation.py \
  tests/dist/test_checkpoint_layouts.py tests/e2e/test_road.py
TESTS ?= $(if $(filter 3.12,$(PYTHON_VERSION)),,$(OLDER_TESTS))
# Containers like to set this one; without bytecode every process compiles torch and Megatron anew.
unexport PYTHONDONTWRITEBYTECODE
# Compiling 20,000 modules ahead would double the time; Python compiles what it imports.
PIP = $(BIN)/python -m pip install --no-compile $(addprefix -c ,$(CONSTRAINTS))

.PHONY: help setup slurm quickstart gpu test test-older lint format docs site look pins release-check clean distclean

help:
	@echo "make setup       .venv with the package in it (.venv/bin/minitron), on the newest Python found"
	@echo "make quickstart  prune and distill SmolLM2-135M on this machine"
	@echo "make gpu         check and measure what needs a GPU; small sizes on a CPU: FLAGS=--small"
	@echo "make test        all tests; on Python 3.11 and 3.10 the part that is run on the older stack"
	@echo "make test-older  the same part, in .venv-older on Python 3.11 or 3.10"
	@echo "make slurm       SLURM for the tests that need one, by apt-get, as root"
	@echo "make lint        ruff, mypy, import-linter, shellcheck, hadolint"
	@echo "make format      let ruff rewrite files"
	@echo "make docs        write docs/keys.md, families.md and map.md from the code"
	@echo "make site        build/site, the documentation as web pages"
	@echo "make look        look at build/site in headless Chromium (apt-get install chromium-driver)"
	@echo "make pins        write requirements/tested-<version of Python>.txt from .venv"
	@echo "make release-check   build, check and install the package, and run it from there"
	@echo "make clean       remove results and caches; distclean: .venv and downloads too"

setup: $(INSTALLED)

# torch goes first and alone: whichever build is chosen, what follows then finds it installed.
$(INSTALLED): pyproject.toml setup.py $(CONSTRAINTS)
	@test -n "$(PYTHON)"
	@echo "make setup: Python $(PYTHON_VERSION), so megatron-core $(STACK)"
	@if [ -x $(BIN)/python ] && ! $(BIN)/python -c 'import sys; sys.exit("%d.%d" % sys.version_info[:2] != "$(PYTHON_VERSION)")'; \
	then echo "make setup: $(VENV) is of another Python than $(PYTHON); remove it, or set VENV=<another folder>"; exit 1; fi
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) $(TORCH)
	$(PIP) -e ".[dev,docs]"
	@touch $@

quickstart: setup
	$(BIN)/python scripts/quickstart_assets.py .quickstart
	$(BIN)/minitron pipeline experiment=quickstart

# make gpu PARTS="logits scores"; RUN_WITH=python3 is for a machine with torch and no network, which
# has no .venv (scripts/carry.py).
gpu: $(if $(RUN_WITH),,setup)
	$(if $(RUN_WITH),,$(BIN)/python scripts/quickstart_assets.py .quickstart)
	$(or $(RUN_WITH),$(BIN)/python) -m benchmarks.gpu $(if $(PARTS),--parts $(PARTS)) $(FLAGS)

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

# The order of files is that of tests/conftest.py; pytest-xdist would take them by number of tests, and
# end with one of ten minutes on one worker. Tests that measure seconds come last and alone.
test: setup slurm
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder -m "not alone" $(TESTS)
	$(BIN)/python -m pytest -m alone $(TESTS)

test-older:
	older=$$(sh scripts/find_python.sh 3.11 3.10) && $(MAKE) test VENV=.venv-older PYTHON=$$older

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/hadolint docker/*Dockerfile
	$(BIN)/shellcheck --external-sources .ci/run launch/lib.sh launch/*.sbatch

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: setup
	$(BIN)/python scripts/config_docs.py docs/keys.md
	$(BIN)/python scripts/families_docs.py docs/families.md
	$(BIN)/python scripts/map_docs.py docs/map.md

site: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

look: site
	$(BIN)/python scripts/look_at_site.py build/site build/screenshots

PINS = requirements/tested-$(PYTHON_VERSION).txt
pins: setup
	@sed '/^[^#]/d' $(PINS) > $(PINS).new
	$(BIN)/python -m pip freeze --exclude-editable | sed '/^#/d; s/+[a-z0-9.]*$$//' >> $(PINS).new
	@mv $(PINS).new $(PINS)

# dist/ is what would be uploaded; the wheel is installed into an environment of its own and run.
release-check: setup
	rm -rf dist
	$(BIN)/python -m build --outdir dist .
	$(BIN)/twine check --strict dist/*
	MINITRON_WHEEL="$(CURDIR)/dist" $(BIN)/python -m pytest -q tests/e2e/test_wheel.py

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .quickstart/run .gpu
	find nemo_minitron tests scripts -name __pycache__ -prune -exec rm -rf {} +

distclean: clean
	rm -rf .venv .venv-older .quickstart .carry
