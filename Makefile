# Two commands: `make demo` sets everything up and runs the main job; `make test` passes the tests.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SLIMPI := $(BIN)/slimpi
# The compiled part of the installation: llama.cpp without its image support.
export CMAKE_ARGS ?= -DLLAVA_BUILD=OFF
export TOKENIZERS_PARALLELISM := false

DEMO_RECIPES := models/smollm2-135m.toml models/minilm-l6-tweets.toml

.PHONY: demo install test test-slow lint bench-peers clean help

help:           ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/ /'

demo: install   ## set up, build every variant of two small models, run them here, print the comparison
	$(SLIMPI) deploy $(DEMO_RECIPES) --on local

install: $(VENV)/installed

$(VENV)/installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[host,dev]'
	touch $@

test: install   ## the fast tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" -n 2

test-slow: install  ## the slow rest: real models
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow -n 2

lint: install   ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench-peers: install  ## perplexity and speed against llama.cpp's own tools, same build, same files
	$(SLIMPI) build models/smollm2-135m.toml
	$(BIN)/python benchmarks/peers.py

clean:          ## remove what was built, keep sources and results
	rm -rf models/artifacts
