# The project's commands; `make help` lists them. Everything stands on `make setup`, which is done once and
# then costs a fraction of a second.
#
# Variables:
#   VENV=.venv          folder of the virtual environment
#   PYTHON3=python3     the Python it is made from, 3.11 or newer
#   TORCH_INDEX=URL     package index with PyTorch's CPU wheels, where pip is not configured for one
#   SIRIUS_BUILD=cpu    vLLM build: cpu, cuda or auto
#   LANES=2             tests that run side by side, each on a core of its own
#   LLAMA_CPP=build/llama.cpp  folder of llama.cpp, for bench-offload
#   NAME, MODEL, ARGS   see the targets

.DEFAULT_GOAL := help
SHELL := /bin/bash

PYTHON3 ?= python3
VENV ?= .venv
TORCH_INDEX ?=
MODEL ?=
NAME ?=
ARGS ?=
LANES ?= 2
LLAMA_CPP ?= build/llama.cpp

PYTHON := $(VENV)/bin/python
# Sets what vLLM's CPU build needs to be fast, and keeps what the user has set.
IN_ENVIRONMENT := VENV="$(VENV)" examples/setup/run_in_environment.sh
DOWNLOAD := $(PYTHON) examples/setup/models.py download

# Engines of one test file share a process, so files are what the lanes divide among themselves: long ones first, that is in
# the order of their names, unit tests last.
PYTEST := python -m pytest --numprocesses $(LANES) --dist loadfile --no-loadscope-reorder

DEMO_MODEL := qwen2.5-coder-0.5b-instruct
TEST_MODELS := smollm2-135m-instruct qwen2.5-coder-0.5b-instruct gemma-3-270m
LARGE_MODEL := qwen2.5-coder-1.5b-instruct

# A copy of the installed vLLM with the patches of patches/, and the tests that run on it.
PATCHED := $(CURDIR)/build/patched-vllm
PATCHED_TESTS := $(addprefix tests/e2e/test_,$(addsuffix .py,patched_copy lossless limits sampling kv_pages refusals doors))
PATCHED_V1 := test_sampling or ragged_batch or ragged_queue or prefix_cache or preemption or density_of_one \
	or switch_sirius or bad_request or setup_is_refused
PATCHED_V2 := ragged_queue or bad_request or threshold_of_zero
PATCHED_CHOICE := patched_copy or flags_and_json or run_batch or (v1 and ($(PATCHED_V1))) or (v2 and ($(PATCHED_V2)))

# Without MODEL the larger model is measured and the smaller one is its draft model.
BENCH_MODEL := $(or $(MODEL),.models/$(LARGE_MODEL))
BENCH_DRAFT := $(if $(MODEL),,--draft-model .models/$(DEMO_MODEL))

.PHONY: help setup model demo bench bench-server bench-latency bench-offload offload-peers bench-compare bench-plot test test-all test-patched lint docs format clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: ## Make the environment: vLLM for this machine, the plugin, the development tools
	@$(PYTHON3) examples/setup/environment.py --venv "$(VENV)" $(if $(TORCH_INDEX),--torch-index "$(TORCH_INDEX)")

model: setup ## Download a model: NAME=qwen2.5-coder-0.5b-instruct; without NAME list them
	@$(if $(NAME),$(DOWNLOAD) $(NAME),$(PYTHON) examples/setup/models.py list)

demo: setup ## Compare vLLM with and without Sirius on real prompts; MODEL=PATH_OR_HUB_NAME for another model
	@$(if $(MODEL),true,$(DOWNLOAD) $(DEMO_MODEL))
	@$(IN_ENVIRONMENT) python examples/demo/run.py $(if $(MODEL),--model "$(MODEL)") $(ARGS)

bench: setup ## Measure arms side by side: ARGS='--arms default threshold', MODEL=PATH_OR_HUB_NAME; see benchmarks/README.md
	@$(if $(MODEL),true,$(DOWNLOAD) $(LARGE_MODEL) $(DEMO_MODEL))
	@$(IN_ENVIRONMENT) python -m benchmarks.run --model "$(BENCH_MODEL)" $(BENCH_DRAFT) $(ARGS)

bench-server: setup ## The same arms as live servers, with `vllm bench serve`
	@$(if $(MODEL),true,$(DOWNLOAD) $(LARGE_MODEL) $(DEMO_MODEL))
	@$(IN_ENVIRONMENT) python -m benchmarks.server --model "$(BENCH_MODEL)" $(BENCH_DRAFT) $(ARGS)

bench-latency: setup ## The same arms with `vllm bench latency`
	@$(if $(MODEL),true,$(DOWNLOAD) $(LARGE_MODEL) $(DEMO_MODEL))
	@$(IN_ENVIRONMENT) python -m benchmarks.latency --model "$(BENCH_MODEL)" $(BENCH_DRAFT) $(ARGS)

bench-offload: setup ## Weights that do not fit: engines in a cage of memory and disk rate; see docs/offload-benchmark.md
	@$(if $(MODEL),true,$(DOWNLOAD) $(LARGE_MODEL))
	@$(IN_ENVIRONMENT) python -m benchmarks.offload.run --model "$(BENCH_MODEL)" \
		$(if $(wildcard $(LLAMA_CPP)/build),--llama-cpp "$(LLAMA_CPP)") $(ARGS)

offload-peers: setup ## Fetch and build llama.cpp, which bench-offload compares with: LLAMA_CPP=FOLDER
	@$(IN_ENVIRONMENT) python -m benchmarks.offload.peers "$(LLAMA_CPP)" $(ARGS)

bench-compare: setup ## Print the tables of runs: ARGS='results/bench/NAME [--markdown]'
	@$(PYTHON) -m benchmarks.compare $(ARGS)

bench-plot: setup ## Draw the charts of a run: ARGS=results/bench/NAME
	@$(PYTHON) -m benchmarks.plot $(ARGS)

test: setup ## Run the tests that take minutes together; ARGS='-k NAME' for some of them
	@$(DOWNLOAD) $(TEST_MODELS)
	@$(IN_ENVIRONMENT) $(PYTEST) -m "not slow" $(ARGS)

test-all: setup ## Run every test, those on the 1.5B model included
	@$(DOWNLOAD) $(TEST_MODELS) $(LARGE_MODEL)
	@$(IN_ENVIRONMENT) $(PYTEST) $(ARGS)

test-patched: setup ## Run end-to-end tests on a copy of vLLM with the source patches of patches/
	@$(DOWNLOAD) $(TEST_MODELS)
	@rm -rf "$(PATCHED)"
	@$(PYTHON) patches/apply.py "$(PATCHED)"
	@$(IN_ENVIRONMENT) env PYTHONPATH="$(PATCHED)" SIRIUS_PATCHED_COPY="$(PATCHED)" \
		$(PYTEST) $(PATCHED_TESTS) -m "not slow" -k "$(PATCHED_CHOICE)" $(ARGS)

lint: setup ## Check style, format and types
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy

docs: setup ## Build the documentation into build/site; dead links and pages outside the navigation are errors
	@NO_MKDOCS_2_WARNING=1 $(PYTHON) -m mkdocs build --quiet --strict

format: setup ## Format the code and repair what can be repaired
	$(PYTHON) -m ruff format .
	$(PYTHON) -m ruff check --fix .

clean: ## Remove caches and build output; the environment, models and results stay
	rm -rf build dist *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find vllm_sirius tests examples benchmarks -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
