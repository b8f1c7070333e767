# Every target below `help` prepares its own environment: a bare Python 3.11 or 3.12 with venv, and pip's index, is enough.
# Variables: PYTHON (which Python makes the environment), VENV (where it lives), EXTRAS, SETUP_FLAGS, PYTEST_FLAGS,
# JOBS (processes that run tests; 1: pytest alone, as --pdb wants it).

PYTHON ?= python3
VENV ?= .venv
EXTRAS ?= dev,report,prep
SETUP_FLAGS ?=
PYTEST_FLAGS ?=
JOBS ?= 3

# A PYTHON that the user named is the only one tried; our own default may give way to a fitting neighbour.
PYTHONS := $(if $(filter file,$(origin PYTHON)),$(PYTHON) python3.11 python3.12,$(PYTHON))
FITS := import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))
SAY := import platform; print("Python " + platform.python_version())
PYTHON_IN_VENV := $(VENV)/bin/python
WORKERS := $(if $(filter 1,$(JOBS)),,-n $(JOBS))

.DEFAULT_GOAL := help
.PHONY: help setup quickstart test test-all lint clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

# Runs each candidate rather than looking for its name: a version manager's shim can exist and still not start.
setup: ## Create or update the virtual environment (about a minute from nothing, then at once)
	@for python in $(PYTHONS); do \
	    if "$$python" -c '$(FITS)' 2>/dev/null; then \
	        exec "$$python" -m tools.setup_environment --venv "$(VENV)" --extras "$(EXTRAS)" $(SETUP_FLAGS); \
	    fi; \
	    tried="$$tried $$python ($$("$$python" -c '$(SAY)' 2>/dev/null || echo does not run))"; \
	done; \
	echo "error: no Python 3.11 or 3.12 among:$$tried. Install one, or name it: make PYTHON=/path/to/python3.11" >&2; \
	exit 1

quickstart: setup ## Train, generate and report on a small model, on this machine, in minutes
	$(VENV)/bin/cola quickstart

test: setup ## Run the tests, without the slow ones
	$(PYTHON_IN_VENV) -m pytest $(WORKERS) $(PYTEST_FLAGS)

test-all: setup ## Run every test
	$(PYTHON_IN_VENV) -m pytest -m "slow or not slow" $(WORKERS) $(PYTEST_FLAGS)

lint: setup ## Check style and format with ruff, types with mypy
	$(PYTHON_IN_VENV) -m ruff check .
	$(PYTHON_IN_VENV) -m ruff format --check .
	$(PYTHON_IN_VENV) -m mypy

clean: ## Remove the environment, caches and build outputs; runs/ and data/ stay
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
