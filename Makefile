# `make help` lists the targets. Each one installs what it needs into a virtual environment when that is missing or
# pyproject.toml has changed, and starts at once when not.
#
#   make test PYTHON=/path/to/python3.12    another interpreter, with its own environment (.venv-3.12)
#   make train ARGS="stages.joint.tokens=100000 run.dir=runs/short"

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
ARGS ?=
WORKERS ?= 2

ifeq ($(PYTHON),python3)
VENV := .venv
else
VENV := .venv-$(shell "$(PYTHON)" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null || echo unknown)
endif

RUN := $(VENV)/bin/python
STAMP := $(VENV)/.complete

# An environment whose interpreter no longer starts (upgraded, moved away) is not complete.
ifneq ($(wildcard $(STAMP)),)
ifneq ($(shell $(RUN) -c 'print(1)' 2>/dev/null),1)
$(shell rm -f $(STAMP))
endif
endif

.PHONY: train test test-long check bench clean help setup

train: $(STAMP) ## Train the tiny experiment from the corpus to the exported checkpoint (ARGS="key=value ...")
	@$(RUN) train.py $(ARGS)

test: $(STAMP) ## Run the tests that take seconds (WORKERS=2 processes)
	@$(RUN) -m pytest -q -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(ARGS)

test-long: $(STAMP) ## Run the tests that take minutes
	@$(RUN) -m pytest -q -m long -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(ARGS)

check: $(STAMP) ## Lint, formatting, types, and who imports whom
	@$(RUN) -m ruff check
	@$(RUN) -m ruff format --check
	@$(RUN) -m mypy nld_train train.py scripts slurm
	@$(VENV)/bin/lint-imports

bench: $(STAMP) ## Measure speed (ARGS="--help" lists the suites); wants a quiet machine
	@$(RUN) scripts/benchmark.py $(ARGS)

setup: $(STAMP) ## Only install

clean: ## Remove environments, caches and build products; runs/ stays
	rm -rf .venv .venv-* data/cache .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
	rm -rf build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

help: ## List the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 20

# The stamp is removed first and written last, so an interrupted installation is not taken for a complete one: without a
# stamp everything is built anew. The lock keeps two makes from building the same environment.
$(STAMP): pyproject.toml
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	    echo "Python 3.11 or newer is needed, and '$(PYTHON)' is $$("$(PYTHON)" --version 2>&1 | tail -n 1 || true)" >&2; \
	    echo "  remedy: make $(or $(MAKECMDGOALS),train) PYTHON=/path/to/python3.11" >&2; exit 1; }
	@exec 9< pyproject.toml; \
	if command -v flock > /dev/null; then flock 9; fi; \
	if [ -e "$@" ] && [ "$@" -nt pyproject.toml ]; then exit 0; fi; \
	if [ -e "$@" ]; then rm -f "$@"; else rm -rf "$(VENV)"; fi; \
	echo "Installing into $(VENV): minutes the first time" >&2; \
	if [ ! -d "$(VENV)" ]; then "$(PYTHON)" -m venv "$(VENV)"; fi; \
	"$(RUN)" -m pip install --quiet --disable-pip-version-check --no-input -e '.[dev]' 9>&-; \
	touch "$@"
