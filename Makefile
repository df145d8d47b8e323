# `make demo` and `make test` do everything on a fresh machine.
# VENV=path picks another virtual environment, PYTHON=path the interpreter for it,
# DEMO_ARGS, TEST_ARGS, BENCH_ARGS and GPU_ARGS pass options on.
VENV ?= .venv
PYTHON ?= python3
export VENV PYTHON

.PHONY: help setup demo serve test test-all lint fix check bench gpu-check clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

setup: ## create the virtual environment, install and build (fast when nothing changed)
	@bash scripts/setup.sh

demo: setup ## a real model through vLLM's server, with and without DSpark
	@$(VENV)/bin/vllm-dspark demo $(DEMO_ARGS)

serve: setup ## the demo server with DSpark, left running
	@$(VENV)/bin/vllm-dspark demo --serve $(DEMO_ARGS)

test: setup ## fast tests
	@bash scripts/test.sh $(TEST_ARGS)

test-all: setup ## fast and slow tests (what CI runs)
	@bash scripts/test.sh --slow $(TEST_ARGS)

lint: setup ## ruff, mypy, clang-format
	@bash scripts/lint.sh

fix: setup ## let ruff and clang-format repair what they can
	@bash scripts/lint.sh --fix

check: lint test ## lint and fast tests, before every commit

bench: setup ## kernel benchmarks, JSON under benchmarks/results/
	@for b in rejection sequential round planner; do \
	  echo "== bench_$$b"; \
	  $(VENV)/bin/python benchmarks/bench_$$b.py \
	    --json benchmarks/results/$$b.json $(BENCH_ARGS) || exit 1; done

gpu-check: setup ## on a machine with an NVIDIA GPU: kernels, times, servers; one report
	@$(VENV)/bin/python benchmarks/gpu_check.py $(GPU_ARGS)

clean: ## remove what was built (not the virtual environment)
	rm -rf build *.egg-info vllm_dspark/_C*.so .mypy_cache .ruff_cache .pytest_cache
