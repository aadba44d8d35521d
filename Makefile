# make train   set up .venv and train a small LLaMA on real text, Adam against Adam+MoLS
# make test    set up .venv and run the quick tests: every engine, stage, mode and main command once (ten minutes)
# make test-all    all tests but the exhaustive tables; .ci/run runs these
# make test-full   with the exhaustive tables, before a release (half an hour); tests/README.md has the tiers
# make train-megatron   the same training on Megatron-core, tensor x pipeline parallel
# make compare  studies/laptop.yaml: Adam and MoLS tuned alike, over seeds, with a report (an hour or two)
# make clients-table   every client of docs/clients.md against its run without MoLS, and the table in that page
# make docs     the pages of docs/ and the API reference as HTML, in build/docs
# Variables: PYTHON (3.11+), NPROC, ACCELERATOR (cpu, cuda, ...), ARGS (more flags for train.py or pytest), JOBS (tests at
#   a time), PIP_FLAGS.

PYTHON ?= python3
VENV ?= .venv
NPROC ?= 2
JOBS ?= 2
ACCELERATOR ?= cpu
ARGS ?=
PIP_FLAGS ?=

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
.PHONY: help setup setup-dev train train-megatron test test-all test-full test-rest lint format architecture \
	pictures examples docs docs-config docs-models clients-table bench compare clean distclean

BIN := $(abspath $(VENV))/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check $(PIP_FLAGS) -c constraints.txt
# DeepSpeed compiles its kernels when they are first used, never while it is installed.
export DS_BUILD_OPS := 0
# The newest megatron-core, which the tests run too. From 0.17 on it asks for Python 3.12, but runs on 3.11: it is
# unpacked into a folder that the tests put on PYTHONPATH, beside the installed version of constraints.txt.
MEGATRON_NEWEST := 0.19.2
NEWEST := $(VENV)/megatron-core-newest
# What runs on the CPU does so in several processes: one thread each, or they fight over the cores.
CPU_ENV := OMP_NUM_THREADS=1 DS_ACCELERATOR=$(ACCELERATOR)
# launch/ comes first, so that `deepspeed` is the shim that takes --config.
RUN_PATH := PATH="$(CURDIR)/launch:$(BIN):$$PATH"

# A new run in the place of the last, unless ARGS resumes that
NEW = $(if $(findstring --resume,$(ARGS)),,--overwrite)

help:
	@sed -n '/^$$/q; s/^# //p' Makefile

$(VENV)/pyvenv.cfg:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Python 3.11 or newer is needed; $(PYTHON) is not: make PYTHON=python3.12 ..." >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)

# A stamp is written only after its install succeeded, so an interrupted one is repeated.
$(VENV)/.stamp-train: $(VENV)/pyvenv.cfg setup.py pyproject.toml constraints.txt
	$(PIP) torch
	$(PIP) -e '.[train,report]'
	@touch $@

# No constraints here: they pin the installed version. One platform: what is used of it is Python alone.
$(NEWEST)/.stamp-$(MEGATRON_NEWEST): $(VENV)/pyvenv.cfg
	rm -rf $(NEWEST)
	$(BIN)/python -m pip download --disable-pip-version-check $(PIP_FLAGS) --no-deps --only-binary=:all: \
		--python-version 3.12 --platform manylinux_2_28_x86_64 --dest $(NEWEST) megatron-core==$(MEGATRON_NEWEST)
	$(BIN)/python -m zipfile -e $(NEWEST)/*.whl $(NEWEST)
	rm $(NEWEST)/*.whl
	@touch $@

$(VENV)/.stamp-dev: $(VENV)/.stamp-train $(NEWEST)/.stamp-$(MEGATRON_NEWEST)
	$(PIP) -e '.[train,report,dev]'
	@touch $@

setup: $(VENV)/.stamp-train

setup-dev: $(VENV)/.stamp-dev

train: setup
	$(RUN_PATH) $(CPU_ENV) deepspeed --num_accelerators $(NPROC) --config configs/ds_mols.json \
		train.py --compare adam $(NEW) $(ARGS)

# Four processes (TP 2 x PP 2), also on two cores. megatron-core is among what setup-dev installs.
train-megatron: setup-dev
	$(CPU_ENV) $(BIN)/torchrun --standalone --nproc_per_node 4 train_megatron.py \
		--config configs/megatron/tiny_tp2_pp2.yaml --compare adam $(NEW) $(ARGS)

# test-rest: what test-all has beyond test.
test: TIER := quick
test-all: TIER := all
test-rest: TIER := rest
test-full: TIER := full
test test-all test-rest test-full: setup-dev
	$(RUN_PATH) $(CPU_ENV) python -m pytest --tier $(TIER) -n $(JOBS) $(ARGS)

lint: setup-dev
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache --no-logo

format: setup-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# The picture of docs/architecture.md, from the code.
architecture: setup-dev
	$(BIN)/python docs/draw_architecture.py

# The pictures of README and docs/: a training of minutes, a plan, the architecture. Look at them before you commit them.
pictures: architecture
	$(RUN_PATH) $(CPU_ENV) deepspeed --num_accelerators 2 --config configs/ds_mols.json \
		train.py --compare adam --overwrite --out runs/pictures
	cp runs/pictures/compare.png runs/pictures/mols/mols_report/mols_report.png docs/img/
	$(RUN_PATH) mols-ds plan configs/models/llama_7b.json --config configs/ds_7b_zero3.json \
		--cluster configs/clusters/h100_8x80.yaml --nodes 4 --sequence 1024 --steps 150000 --plot docs/img/plan.png

# docs/examples/: runs each example and writes its page.
examples: setup-dev
	$(RUN_PATH) $(CPU_ENV) python docs/write_examples.py $(ARGS)

# The keys in docs/config.md, from mols_ds/core/config.py.
docs-config: setup
	$(BIN)/python docs/write_config.py

# The table in docs/clients.md: real clients on gloo, a quarter of an hour. ARGS="Lightning": the rows of one client.
clients-table: setup-dev
	$(RUN_PATH) $(CPU_ENV) python -m tests.integrations.table $(ARGS)

# The tables in docs/models.md: every config class of the installed transformers, built without weights. A minute.
docs-models: setup
	$(BIN)/python docs/write_models.py

$(VENV)/.stamp-docs: $(VENV)/.stamp-train
	$(PIP) -e '.[train,report,docs]'
	@touch $@

# HTML in build/docs. A broken link or anchor fails it.
docs: $(VENV)/.stamp-docs
	$(BIN)/mkdocs build --strict $(ARGS)

# Minutes: step time over stock DeepSpeed, and the accumulator against the machine's copy bandwidth.
bench: setup-dev
	$(RUN_PATH) $(CPU_ENV) python benchmarks/overhead.py $(ARGS)
	$(RUN_PATH) DS_ACCELERATOR=$(ACCELERATOR) python benchmarks/accumulator.py

# An hour or two: every arm of a study at its best rate over seeds, and the report.
STUDY ?= studies/laptop.yaml
compare: setup-dev
	$(RUN_PATH) DS_ACCELERATOR=$(ACCELERATOR) mols-ds compare $(STUDY) --jobs $(NPROC) $(ARGS)

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis mols_report runs
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV)
