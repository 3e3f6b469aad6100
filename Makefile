# softvllm: `make` alone lists what can be made.
#
# Variables: EXTRA=cpu|cuda (which vLLM; cpu unless installed otherwise), PYTHON=python3.12,
#            VENV=.venv, QUESTION and MODE for demo, ARGS for test and bench.

EXTRA  ?=
VENV   ?= .venv
PYTHON ?=
ARGS   ?=

QUESTION ?= What is 7 plus 5?
MODE     ?= hard,soft,fuzzy,mixed

export EXTRA VENV PYTHON QUESTION

BIN := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help install test lint format demo bench

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-9s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo
	@echo '  EXTRA=cuda for NVIDIA GPUs; ARGS="..." is passed on by test and bench.'

install: ## Make .venv and install everything into it (at once when nothing changed)
	@scripts/install.sh

demo: install ## Think about QUESTION="..." in each MODE (hard,soft,fuzzy,mixed) with the default model
	@"$(BIN)/softvllm" generate "$$QUESTION" --cot-mode "$(MODE)"

test: install ## Run the tests (ARGS="-m 'not engine'" for the quick ones)
	@"$(BIN)/python" -m pytest $(ARGS)

lint: install ## Check style and types: ruff check, ruff format --check, mypy
	@"$(BIN)/ruff" check .
	@"$(BIN)/ruff" format --check .
	@"$(BIN)/mypy"

format: install ## Apply ruff's fixes and formatting
	@"$(BIN)/ruff" check --fix .
	@"$(BIN)/ruff" format .

bench: install ## Measure tokens/s of every mode against stock vLLM
	@"$(BIN)/python" -m softvllm.bench $(ARGS)
