# make demo        the whole pipeline on this machine, each command printed before it runs (TP=2 PP=1)
# make test        the test suite, JOBS=2 files at a time (ARGS= goes to pytest)
# make kill-test   its test that kills a run at random moments, with KILLS=20 kills instead of 3
# make bench       this trainer beside transformers' Trainer, and what the loss saves; writes benchmarks/results/
# make gpu-check   what only a GPU can show, in under eight minutes; writes benchmarks/results/; without one a dry run
# make same-numbers REF=<commit>  the same losses, tokens and weights as that commit's, to the last bit (ARGS=--demo)
# make check       lint, format, types, import contract
# make setup       .venv with pinned versions; the others call it, and it does nothing when it is up to date
# make clean       remove what these made
#
# PYTHON=      the interpreter that .venv is made from: 3.11 or 3.12; for gpu-check, one to use as it is, without .venv
# PIP_ARGS=    options for pip install. Where the package index serves torch's CUDA build (several GB, works too),
#              point it at an index of CPU builds: PIP_ARGS="--extra-index-url <PyTorch's CPU wheels>"

SHELL := /bin/bash
.DEFAULT_GOAL := help

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.up-to-date
CONSTRAINTS := environments/constraints-cpu.txt
SUPPORTED := import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))
PYTHON ?= $(shell for p in python3.11 python3.12 python3; do $$p -c '$(SUPPORTED)' 2>/dev/null && echo $$p && break; done)
PIP = PYTHONUNBUFFERED=1 $(BIN)/python -m pip install --disable-pip-version-check --only-binary :all: --constraint $(CONSTRAINTS) $(PIP_ARGS)

PACKAGE := '.[data,demo,dev]'
# On a terminal one line that changes, with pip's step and the time; elsewhere nothing but errors.
PIP_STEPS = awk 'BEGIN {srand(); begun = srand()} /^ *(Collecting|Downloading|Using|Installing)/ \
	{srand(); printf "\r\033[K  %d s: %.70s", srand() - begun, $$0; fflush()} END {printf "\r\033[K"}'
pip = if [ -t 1 ]; then set -o pipefail; $(PIP) $(1) | $(PIP_STEPS); else $(PIP) -qq $(1); fi

TP ?= 2
PP ?= 1
JOBS ?= 2
KILLS ?= 20

.PHONY: help setup demo test kill-test bench gpu-check same-numbers check clean

help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' Makefile

setup: $(STAMP)

$(STAMP): setup.py pyproject.toml $(CONSTRAINTS)
	@$(or $(PYTHON),false) -c '$(SUPPORTED)' || { echo "make: Python 3.11 or 3.12 is needed; name one with PYTHON=<interpreter>" >&2; exit 2; }
	@echo "make: installing $(CONSTRAINTS) into $(VENV); this takes a few minutes"
	@echo "make: 1 of 3, $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@echo "make: 2 of 3, pip and setuptools"
	@$(call pip,pip setuptools)
	@echo "make: 3 of 3, torch, megatron-core, transformers and what they need"
	@$(call pip,--no-build-isolation --editable $(PACKAGE))
	@touch $@

demo: setup
	$(BIN)/python examples/digits/demo.py --tp $(TP) --pp $(PP)

test: setup
	$(BIN)/python -m pytest -n $(JOBS) $(ARGS)

kill-test: setup
	KILLS=$(KILLS) $(BIN)/python -m pytest tests/training/test_kill.py $(ARGS)

bench: setup
	$(BIN)/python -m benchmarks.loss_memory
	$(BIN)/python -m benchmarks.packing
	$(BIN)/python -m benchmarks.data
	$(BIN)/python -m benchmarks.compare $(ARGS)

# Where there is a GPU, torch and Transformer Engine often come with the machine's own Python.
HAS_ENGINE := import importlib.util as i, sys; sys.exit(not all(map(i.find_spec, ("torch", "transformer_engine"))))
OWN_PYTHON := $(if $(wildcard $(BIN)/python),,$(shell python3 -c '$(HAS_ENGINE)' 2>/dev/null && echo python3))
GPU_PYTHON := $(if $(filter command environment,$(origin PYTHON)),$(PYTHON),$(or $(OWN_PYTHON),$(BIN)/python))
gpu-check: $(if $(filter $(BIN)/python,$(GPU_PYTHON)),setup)
	$(GPU_PYTHON) -m benchmarks.gpu_check $(ARGS)

same-numbers: setup
	$(BIN)/python -m benchmarks.same_numbers --ref $(REF) $(ARGS)

check: setup
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

clean:
	rm -rf $(VENV) demo build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
