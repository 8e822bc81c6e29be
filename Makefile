# `make help` lists the targets. Everything runs in .venv, which the first target makes.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# What `make reference` trains, for how long and where; it takes up what was stopped.
RECIPE ?= ref-8m
MINUTES ?= 90
OUT ?= reference
export HF_HUB_DISABLE_TELEMETRY := 1
export TOKENIZERS_PARALLELISM := false

.DEFAULT_GOAL := help
.PHONY: help demo test check format bench bench-seeds reference clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 16

demo: $(READY) ## compress the bundled model, reload it in a fresh process, measure it, show the result
	@$(BIN)/python examples/demo.py

test: $(READY) ## run every test
	$(BIN)/python -m pytest -n 2 --dist loadfile -q

check: $(READY) ## ruff and mypy --strict
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY) ## let ruff rewrite what it can
	$(BIN)/ruff check --fix-only -q .
	$(BIN)/ruff format -q .

bench: $(READY) ## measure speed, memory and overhead; write benchmarks/results/*.json
	$(BIN)/python benchmarks/run.py

bench-seeds: $(READY) ## rerun the claims of the older systems, on MODELS="FOLDER …" or those at hand
	$(BIN)/python benchmarks/run.py seeds

reference: $(READY) ## train a reference model from random weights: RECIPE=ref-8m MINUTES=90 OUT=reference
	$(BIN)/python benchmarks/reference/train.py $(RECIPE) --out $(OUT) --minutes $(MINUTES) --resume
	$(BIN)/python benchmarks/reference/card.py $(OUT)/$(RECIPE)

clean: ## remove the environment and everything generated
	rm -rf $(VENV) demo-artifact .pytest_cache .mypy_cache .ruff_cache

$(READY): pyproject.toml constraints.txt CMakeLists.txt $(wildcard native/*)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "tenpak needs Python 3.11 or newer; try make PYTHON=python3.12")'
	@echo "setting up $(VENV) (once)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@
