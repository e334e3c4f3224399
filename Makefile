# Targets for people and for CI. `make help` lists them; each sets up what it needs, and the second time does nothing.
#
# A stamp under .venv says that a step is done; it is older than its inputs when the step must run again.

PYTHON ?= python3
VENV := .venv
STAMPS := $(VENV)/stamps
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
SOURCES := setup.py pyproject.toml $(shell find csrc -type f 2>/dev/null)

.PHONY: help setup test test-layouts test-rest check demo format clean distclean
.DEFAULT_GOAL := help

help:  ## list the targets
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: $(STAMPS)/megascratch  ## make .venv with the megascratch command in it

test: $(STAMPS)/test  ## run the whole test suite, in two halves side by side
	@$(MAKE) --no-print-directory --jobs=2 --keep-going test-layouts test-rest

# Whole layouts wait for each other's ranks, the rest computes: together they keep two cores busy.
LAYOUTS := tests/engine tests/align
test-layouts:
	$(BIN)/python -m pytest $(LAYOUTS)
test-rest:
	$(BIN)/python -m pytest $(addprefix --ignore=,$(LAYOUTS))

check: $(STAMPS)/check  ## lint (ruff) and types (mypy)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

demo: setup  ## raw text → tokenizer → pretraining → resume on another layout → convert → generate, on this machine
	$(BIN)/python examples/demo/demo.py

format: $(STAMPS)/check  ## format the code, and mend what ruff can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove what was built, but not .venv
	rm -rf build demo *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find megascratch -name '*.so' -delete
	rm -f $(STAMPS)/megascratch $(STAMPS)/test $(STAMPS)/check

distclean: clean  ## remove .venv too
	rm -rf $(VENV)

$(STAMPS)/venv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "megascratch needs Python 3.11 or newer, and $(PYTHON) is not: make setup PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "$(PYTHON) cannot make virtual environments: install its venv package (Debian, Ubuntu: apt-get install python3-venv)" >&2; exit 1; }
	@command -v g++ >/dev/null || { echo "megascratch compiles its kernels: install g++ (Debian, Ubuntu: apt-get install g++)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@mkdir -p $(STAMPS) && touch $@

$(STAMPS)/torch: tools/install_torch.py pyproject.toml | $(STAMPS)/venv
	$(BIN)/python tools/install_torch.py
	@touch $@

$(STAMPS)/megascratch: $(SOURCES) | $(STAMPS)/torch
	$(PIP) 'setuptools>=77' 'pybind11>=2.13,<4' 'ninja>=1.11'
	$(PIP) --no-build-isolation --editable .
	@touch $@

# The package itself is installed by now: this only adds what the extra names.
$(STAMPS)/test $(STAMPS)/check: $(STAMPS)/%: pyproject.toml | $(STAMPS)/megascratch
	$(PIP) 'megascratch[$*]'
	@# An oracle of which one module is loaded: what its wheel asks for besides would replace half of what is here.
	@[ $* != test ] || $(PIP) --no-deps verl==0.9.1
	@touch $@
