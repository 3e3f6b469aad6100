# softvllm: `make` alone lists what can be made.
#
# Variables: EXTRA=cpu,trainer or cuda,trainer (which vLLM; cpu unless told), PYTHON=python3.12,
#            VENV=.venv, MODEL for serve, QUESTION and MODE for demo, ARGS for serve, test, bench.

EXTRA  ?=
VENV   ?= .venv
PYTHON ?=
ARGS   ?=

MODEL    ?=
QUESTION ?= What is 7 plus 5?
MODE     ?= hard,soft,fuzzy,mixed

export EXTRA VENV PYTHON QUESTION

BIN := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help install serve test lint format demo bench

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-9s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo
	@echo '  EXTRA=cuda,trainer for NVIDIA GPUs; ARGS="..." is passed on by serve, test and bench.'

install: ## Make .venv and install everything into it (at once when nothing changed)
	@scripts/install.sh

serve: install ## Serve MODEL (default: SmolLM2-135M) on 127.0.0.1:8000, OpenAI-compatible (ARGS="--port 8001")
	@"$(BIN)/softvllm" serve $(MODEL) --host 127.0.0.1 $(ARGS)

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
