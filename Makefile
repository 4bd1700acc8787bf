# `make train` and `make test` set everything up; `make gpu` uses PYTHON as given; the other targets use the same .venv.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
READY := $(VENV)/.ready
RUNS ?= experiments/results
OUT ?= $(if $(filter experiments/results,$(RUNS)),experiments/results,tables)

.DEFAULT_GOAL := help
.PHONY: help train test torture tables gpu extras docs lint clean

help:  ## this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-8s %s\n", $$1, $$2}'
	@echo "  then, with .venv/bin on the PATH (. .venv/bin/activate):"
	@echo "  python train.py --help            what can be set"
	@echo "  python train.py optimizer=adamw   another optimizer; -m optimizer=adamw,frugal,adafrugal for several"
	@echo "  python -m adafrugal.reports       the table of the runs under runs/"

$(READY): requirements.txt pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

train: $(READY)  ## train the default run: AdaFRUGAL on a small LLaMA and the embedded text (ARGS='optimizer=adamw' for another)
	$(VENV)/bin/python train.py $(ARGS)

test: $(READY)  ## run the test suite on all cores (ARGS='tests/optim -x' for a part)
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n auto --dist worksteal $(ARGS)

torture: $(READY)  ## run the long fault suite: kills, full disks, damage, bad input; half an hour
	ADAFRUGAL_TORTURE=1 OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n auto --dist worksteal tests/faults tests/test_train.py tests/test_train_data.py tests/launching/test_launchers.py tests/tracking tests/training tests/memory tests/benchmarks tests/test_train_finetune.py

extras: $(READY)  ## install what optimizer=lora, model=minilm, tracking=tensorboard, other trainers' tests and the GPU kernel's tests on a CPU need (peft; 83 MB of weights; tensorboard; trl, lightning; triton)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-extras.txt

tables: $(READY)  ## the pages of experiments/results from the records there (RUNS=runs: from your own, in tables/)
	$(VENV)/bin/python -m adafrugal.reports $(RUNS) --pages $(OUT)

gpu: OUT = gpu-results
gpu:  ## measure a machine with a GPU in about eight minutes, with PYTHON as given (ARGS='--device cpu' to try it)
	PYTHONPATH="$(CURDIR)/src$${PYTHONPATH:+:$$PYTHONPATH}" $(PYTHON) experiments/benchmarks/gpu.py --out $(OUT) $(ARGS)

docs: $(READY)  ## the pages of docs/ and of the docstrings as HTML, in site/ (mkdocs); checks links
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-docs.txt
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict

lint: $(READY)  ## run ruff, and mypy on the library
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

clean:  ## remove the environment, the cached text and the pages of make docs; runs/ stays
	rm -rf $(VENV) cache site
