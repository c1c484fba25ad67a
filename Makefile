# `make` alone lists the targets. Everything is made inside the checkout (.venv, build) but the engine, which lies
# in a user cache and is found again by other checkouts.

PYTHON      ?= python3
VENV        ?= .venv
EXTRAS      ?= dev
PYTEST_ARGS ?=
BIN         := $(VENV)/bin
STAMP       := $(VENV)/installed
DEMO        := build/demo
MINIATURE   := models/miniature/Hunyuan-Miniature-FP8
ROOMS       := $(patsubst %/__init__.py,%,$(wildcard */__init__.py))

# The real vocabulary and configs, where somebody has put them beside the checkout; without them those tests skip.
ifndef HYMOE_TEST_DATA
ifneq ($(wildcard ../shared/data/.),)
export HYMOE_TEST_DATA := $(abspath ../shared/data)
endif
endif

.DEFAULT_GOAL := help
.PHONY: help env setup demo test test-long test-oracle test-stock check types bench docs clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1 @/p' $(MAKEFILE_LIST) | awk -F@ '{printf "  make %-12s %s\n", $$1, $$2}'

$(STAMP): pyproject.toml
	@command -v "$(PYTHON)" >/dev/null || \
	    { echo "error: no $(PYTHON); install it (Debian, Ubuntu: apt install python3 python3-venv), or name one that is there: make PYTHON=FILE" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "error: $(PYTHON) is older than 3.11; install a newer one and run make PYTHON=python3.11 …" >&2; exit 1; }
	@echo "installing into $(VENV)" >&2
	@$(PYTHON) -m venv $(VENV) || \
	    { echo "error: $(PYTHON) cannot make $(VENV); on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[$(EXTRAS)]'
	@touch $@

env: $(STAMP)

setup: env ## make .venv and the engine (minutes the first time, a second afterwards)
	@$(BIN)/hy-engine build

demo: setup ## the whole way with the embedded miniature: checkpoint, quantized GGUF, answer
	@mkdir -p $(DEMO)
	$(BIN)/hy-convert $(MINIATURE) $(DEMO)/Hunyuan-Miniature-Q4_K_M.gguf --quant Q4_K_M --overwrite
	$(BIN)/hy-chat $(DEMO)/Hunyuan-Miniature-Q4_K_M.gguf -p "What does the lamp at the end of the pier do?"
	@cat docs/next.txt

test: setup ## the default tests: minutes, no GPU, no real weights
	$(BIN)/pytest $(PYTEST_ARGS)

test-long: setup ## soaks, fuzzing and large files
	$(BIN)/pytest -m long $(PYTEST_ARGS)

test-stock: setup ## against an unpatched engine and llama.cpp's own converter (compiles a second engine; torch, several hundred MB, goes into .venv-oracle)
	$(BIN)/pytest -m stock $(PYTEST_ARGS)

test-oracle: ## against transformers (torch, several hundred MB, goes into .venv-oracle)
	@$(MAKE) --no-print-directory setup VENV=$(VENV)-oracle EXTRAS=dev,oracle
	$(VENV)-oracle/bin/pytest -m oracle $(PYTEST_ARGS)

# Type checkers cannot follow the editable install's import hook; links show them the installed layout.
types: ## link the rooms into build/types so that mypy sees hymoe as it is installed
	@rm -rf build/types && mkdir -p build/types/hymoe
	@ln -s $(addprefix $(CURDIR)/,$(wildcard src/hymoe/*.py src/hymoe/py.typed) $(ROOMS)) build/types/hymoe/

check: env types ## lint, format and types of everything
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict -p hymoe
	MYPYPATH=tests:bench:training $(BIN)/mypy --strict tests $(wildcard bench/*.py docs/*.py training/*.py)

bench: setup ## our converter and the stock one side by side (torch, several hundred MB, goes into .venv-oracle)
	$(BIN)/python bench/convert.py

docs: env ## write the --help texts into README.md and docs/commands.md, and the tables of docs/placement.md
	$(BIN)/python docs/generate.py
ifdef HYMOE_TEST_DATA
	$(BIN)/python docs/placement.py $(HYMOE_TEST_DATA)/a13b
endif

clean: ## remove build, caches and the environments (the engine's cache stays; `hy-engine path` says where)
	rm -rf build dist $(VENV) $(VENV)-oracle *.egg-info .mypy_cache .pytest_cache .ruff_cache
