# `make` alone lists what can be done. Every verb does its own set-up.
.DEFAULT_GOAL := help
.PHONY: help setup environment demo docs test test-fast bench conformance gpu-check gpu-bundle lint stack clean

SHELL := /bin/bash
BIN := .venv/bin
# The first Python on the path that Featherweight runs on; `make setup PYTHON=...` chooses another.
SUITS := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))
PYTHON ?= $(shell for p in python3 python3.12 python3.11; do $$p -c '$(SUITS)' 2>/dev/null && { echo $$p; exit; }; done; echo python3)
# Asked for by name, set-up tries again what failed last time.
SETUP = @$(PYTHON) infra/bootstrap.py $(if $(filter setup,$(MAKECMDGOALS)),--retry)
# Three workers for two cores, one thread a worker: they wait a fifth of their time for what they start. Four at most, because
# each holds torch and its engines in memory.
# A file stays on one worker, so that what its tests share is made once; in order, because the longest come early.
WORKERS := $(shell echo $$(( ($$(getconf _NPROCESSORS_ONLN) * 3 + 1) / 2 )))
PYTEST := $(BIN)/python -m pytest --numprocesses $(WORKERS) --maxprocesses 4 --dist loadfile --no-loadscope-reorder
# Every test process would compile the tests anew.
unexport PYTHONDONTWRITEBYTECODE
# Nothing phones home from here.
export DO_NOT_TRACK := 1
export GX_ANALYTICS_ENABLED := false
export HF_HUB_DISABLE_TELEMETRY := 1
export MLFLOW_DISABLE_TELEMETRY := true
export PREFECT_SERVER_ANALYTICS_ENABLED := false
export VLLM_NO_USAGE_STATS := 1

help: ## list the verbs
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

setup: ## make .venv and the toolchains (again in a second; retries a toolchain that failed)
	$(SETUP)

environment: ## make .venv alone: all that the linters need
	$(SETUP) --no-toolchains

demo: ## run the main job: recipes/demo.yaml, from nothing to a promoted champion
	$(SETUP)
	@$(BIN)/featherweight optimize recipes/demo.yaml

docs: ## make the documentation, with its reference out of the code (build/docs/index.html opens offline)
	$(SETUP) --no-toolchains
	@$(BIN)/python -m infra.site build/docs

test: ## run the tests
	$(SETUP)
	@$(PYTEST) $(ARGS)

test-fast: ## run the tests that start no engine and no server and take a moment: what one runs while writing
	$(SETUP)
	@$(PYTEST) -m "not engine and not server and not slow" --durations 3 $(ARGS)

bench: ## run the benchmarks
	$(SETUP)
	@$(BIN)/python -m benchmarks $(ARGS)

conformance: ## every family of models in tiny through every engine, and docs/runtimes.md (it resumes, and redoes what changed)
	$(SETUP)
	@$(BIN)/python -m conformance --page docs/runtimes.md $(ARGS)

gpu-check: ## prove the CUDA side on this machine within ten minutes; without a GPU all that needs none (build/gpu-check)
	$(SETUP)
	@$(BIN)/python -m infra.gpu_check --out build/gpu-check $(ARGS)

gpu-bundle: ## make the folder to carry to a GPU machine without a network (build/gpu-bundle; there: bash gpu-bundle/run)
	$(SETUP)
	@$(BIN)/python infra/gpu_check/bundle.py build/gpu-bundle $(ARGS)

lint: ## check style, format, types and who imports whom
	$(SETUP) --no-toolchains
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-logo --no-cache

stack: ## start PostgreSQL, S3, MLflow and Prefect here, without Docker (Ctrl-C stops them)
	$(SETUP) --extras dev,stack
	@$(BIN)/python infra/stack.py

clean: ## remove environments and caches; .featherweight with your results stays
	rm -rf .venv .toolchains build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
