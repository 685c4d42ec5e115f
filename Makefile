# Each target makes the virtual environment it needs: a fresh clone has only python3 and a compiler.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
STAMP = $(VENV)/.installed

.PHONY: help venv test test-slow check demo kernels bench
help:
	@echo "make venv | test | test-slow | check | demo | kernels | bench"

venv: $(STAMP)

# torch first and by itself: the pair that equality to the bit is a contract for. npm brings the tests a real llama.cpp.
$(STAMP): pyproject.toml tests/package-lock.json
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet torch==2.13.0
	$(BIN)/python -m pip install --quiet -e '.[dev,cuda,mlx,demo]' transformers==5.23.0
	npm ci --prefix tests --ignore-scripts --no-audit --no-fund --silent
	touch $@

test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "not slow" tests

test-slow: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow tests

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

demo: $(STAMP)
	$(BIN)/python examples/spdx/demo.py

# Ahead of time, for sm_80, sm_90, sm_100 and sm_120: needs no GPU
kernels: $(STAMP)
	$(BIN)/python -m smedjan.backends.cuda_triton.aot

bench: $(STAMP)
	$(BIN)/python -m pytest -m "" bench
