# Two commands do all the set-up on a fresh machine: `make demo` and `make test`.
# They need nothing but Python 3.11 or later; the environment in .venv is made when missing and reused when not.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.isthmus-installed
DEV_STAMP := $(VENV)/.isthmus-dev-installed
DOCS_STAMP := $(VENV)/.isthmus-docs-installed
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
DEMO_OUT ?= isthmus-demo
DEMO_ARGS ?=
# The short set of benchmarks; BENCH="line --networks mlp" runs one with options, BENCH=--list names all.
BENCH ?=
# One process per core with one thread each: faster than one process with many threads on small tensors.
# A file stays in one process, which makes its shared fixtures once.
PYTEST_ARGS ?= -n auto --dist loadfile
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest

.PHONY: demo test check types docs bench slow format clean help

help:
	@echo "make demo | test | slow | check | docs | bench | format | clean"

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Isthmus needs Python 3.11 or later; set PYTHON=..."; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) "$$(grep '^torch==' constraints.txt)"
	$(PIP) -e ".[all]"
	@touch $@

$(DEV_STAMP): $(STAMP)
	$(PIP) -e ".[dev]"
	@touch $@

$(DOCS_STAMP): $(STAMP)
	$(PIP) -e ".[docs]"
	@touch $@

demo: $(STAMP)
	$(BIN)/isthmus demo --out $(DEMO_OUT) $(DEMO_ARGS)

test: $(DEV_STAMP)
	$(PYTEST) $(PYTEST_ARGS)
	$(PYTEST) --doctest-modules src

# Fits an hour on two cores; the dearest tests are marked huge as well and run by `pytest -m huge`.
slow: $(DEV_STAMP)
	$(PYTEST) -m "slow and not huge" $(PYTEST_ARGS)

check: $(DEV_STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

format: $(DEV_STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(DOCS_STAMP)
	$(BIN)/sphinx-build -W --keep-going -q -b html docs docs/_build/html
	@echo "docs/_build/html/index.html"

bench: $(DEV_STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks $(BENCH)

clean:
	rm -rf $(VENV) build dist docs/_build .pytest_cache .ruff_cache .hypothesis
