# Every target does its own set-up: a virtual environment in .venv with the versions of constraints.txt.
# Variables: PYTHON (3.11 or newer), TORCH_INDEX (an index with PyTorch's CPU wheels, where pip's own index would bring
# the CUDA build), EXTRAS, PYTEST_ARGS.

SHELL := bash
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

VENV ?= .venv
EXTRAS ?= train,onnx,dev
PYTEST_ARGS ?=
TORCH_INDEX ?=
ifeq ($(origin PYTHON), undefined)
PYTHON := $(shell for p in python3 python3.13 python3.12 python3.11 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; exit; }; done; echo python3)
endif

PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
SOURCES := src tests examples $(wildcard scripts benchmarks metrics)

TORCH_VERSION := $(shell sed -n 's/^torch==//p' constraints.txt)
PIP := $(PY) -m pip install --quiet --disable-pip-version-check

.PHONY: help install demo space hub test test-slow quality style docs clean

help: ## show this list
	@echo "synernet_hf: semantic segmentation from image-level labels. Targets:"
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 14 | sed 's/^/  make /'

install: $(STAMP) ## make .venv and install the package with its pinned versions
	@echo "Installed in $(VENV); activate it with: source $(VENV)/bin/activate"

$(STAMP): pyproject.toml constraints.txt
	@set -e; start=$$SECONDS; \
	if ! command -v $(PYTHON) > /dev/null; then \
		echo "Python 3.11 or newer is needed and '$(PYTHON)' was not found: install it, or name one with make PYTHON=/path/to/python." >&2; \
		exit 1; \
	fi; \
	if ! $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then \
		echo "Python 3.11 or newer is needed and '$(PYTHON)' is $$($(PYTHON) -V): name a newer one with make PYTHON=/path/to/python." >&2; \
		exit 1; \
	fi; \
	if $(PY) -c 'import sys, pip; sys.exit(sys.version_info < (3, 11))' > /dev/null 2>&1; then \
		echo "[1/4] Using the virtual environment in $(VENV)."; \
	else \
		echo "[1/4] Making a virtual environment in $(VENV) with $$($(PYTHON) -V)."; \
		rm -rf $(VENV); \
		if ! $(PYTHON) -m venv $(VENV); then \
			rm -rf $(VENV); \
			echo "'$(PYTHON) -m venv' failed: on Debian and Ubuntu it needs the package python3-venv." >&2; \
			exit 1; \
		fi; \
	fi; \
	echo "[2/4] Installing torch $(TORCH_VERSION)."; \
	if ! $(PIP) $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) -c constraints.txt "torch==$(TORCH_VERSION)"; then \
		echo "torch $(TORCH_VERSION) could not be installed: check the network, or name an index that has it with make TORCH_INDEX=URL." >&2; \
		exit 1; \
	fi; \
	echo "[3/4] Installing synernet_hf[$(EXTRAS)] with the versions of constraints.txt (one to three minutes)."; \
	$(PIP) -c constraints.txt -e ".[$(EXTRAS)]"; \
	echo "[4/4] Checking that the package imports."; \
	$(PY) -c 'import synernet_hf'; \
	touch $@; \
	echo "The set-up took $$((SECONDS - start)) s."

demo: $(STAMP) ## train on generated images, evaluate, predict, draw a figure (minutes on a CPU)
	@$(PY) -m synernet_hf demo

space: $(STAMP) ## show a page to look into a model (MODEL=runs/demo, or a Hub id; installs the demo extra)
	@$(PIP) -c constraints.txt -e ".[train,demo]"
	@$(PY) examples/space/app.py $(MODEL)

hub: $(STAMP) ## start a hub on this machine, to try pushing and loading without network (PORT=8808)
	@$(PY) tests/hub_server.py --port $(or $(PORT),8808)

test: $(STAMP) ## run the tests (offline, CPU)
	@echo "Running the tests (those marked slow are left out)."
	@set -e; start=$$SECONDS; $(PY) -m pytest tests $(PYTEST_ARGS); echo "The tests took $$((SECONDS - start)) s."

test-slow: $(STAMP) ## run the tests marked slow
	@$(PY) -m pytest tests -m slow $(PYTEST_ARGS)

quality: $(STAMP) ## check the code with ruff (rules and format)
	@$(PY) -m ruff check $(SOURCES)
	@$(PY) -m ruff format --check $(SOURCES)

style: $(STAMP) ## format the code with ruff
	@$(PY) -m ruff check --fix $(SOURCES)
	@$(PY) -m ruff format $(SOURCES)

docs: $(STAMP) ## write the documentation as a web site to site/ (installs the docs extra); warnings end it
	@$(PIP) -c constraints.txt -e ".[docs]"
	@NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --quiet --clean
	@echo "Open site/index.html."

clean: ## remove caches and builds (.venv and runs/ stay)
	@rm -rf build dist site .pytest_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
