# Everything here runs from a bare clone with Python 3.11 or later; `make` says what there is.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-builtin-rules --no-print-directory

PYTHON ?= python3# the interpreter that makes .venv
KILLS ?= 1000# how many processes `make soak` kills
LIMIT ?=# texts that `make demo` embeds; empty: all
JOBS ?= 2# processes that run tests, one of them those that start Ray, but the guides; 0: one for all
ARGS ?=# more arguments for pytest, such as ARGS='-k plan -x'

BIN := .venv/bin
INSTALLED := .venv/.installed
PIP := PIP_DISABLE_PIP_VERSION_CHECK=1 $(BIN)/python -m pip install --quiet --constraint constraints.txt
TORCH := $(shell grep '^torch==' constraints.txt)
# Models come from folders here, never from a hub; workers import tests/ from the root.
OFFLINE := HF_HUB_OFFLINE=1 PYTHONPATH="$(CURDIR)$${PYTHONPATH:+:$$PYTHONPATH}"

.PHONY: help demo test check bench soak clean

help: ## say what there is (the default)
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-7s %s\n", $$1, $$2}' Makefile
	@echo
	@awk -F '[?]=|# ' '/^[A-Z]+ [?]=/ {printf "  %-10s %s\n", $$1, $$3}' Makefile

demo: $(INSTALLED) ## embed 7,168 real conversations, verify the output, show neighbours; again: nothing left to do
	@$(OFFLINE) $(BIN)/python jobs/demo.py $(if $(LIMIT),--limit $(LIMIT))

test: $(INSTALLED) ## run all tests but the soak
	@$(OFFLINE) $(BIN)/python -m pytest --numprocesses $(JOBS) --dist loadscope $(ARGS)

check: $(INSTALLED) ## lint, format, types and the floors of the house; runs no tests
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

bench: $(INSTALLED) ## measure local models beside others, and the cost of the engine, of a plan and of a resume
	@$(PIP) --no-deps --requirement benchmarks/peers.txt
	@failed=; for name in local overhead resume; do \
		$(OFFLINE) $(BIN)/python benchmarks/$$name.py || failed="$$failed $$name"; \
	done; test -z "$$failed" || { echo "failed in part:$$failed"; exit 1; }

soak: $(INSTALLED) ## run the tests marked soak, then kill runs at random KILLS times, and check that no row is lost or doubled
	@$(OFFLINE) $(BIN)/python -m pytest -m soak
	@$(OFFLINE) $(BIN)/python tests/soak.py --kills $(KILLS)

clean: ## delete what make, the tools and the demo made, .venv included
	@rm -rf .venv demo build dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(INSTALLED): pyproject.toml constraints.txt tests/kura.txt
	@echo "making .venv with $(PYTHON), and installing the versions of constraints.txt (some minutes the first time)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed: make PYTHON=python3.11")'
	@$(PYTHON) -m venv .venv
	@echo "installing $(TORCH)"
	@$(PIP) $(TORCH)
	@echo "installing embedding-engine, its dependencies and the tools"
	@$(PIP) --editable '.[dev]'
	@$(PIP) --no-deps --requirement tests/kura.txt
	@touch $@
