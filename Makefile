# make setup   an environment in .venv with torch and this package
# make demo    dense against focus on the bundled model; POLICY=focus-evict: on the block model
# make test    every test that needs no GPU
# make test-all  these, lm-eval, the report in a browser, and whole commands on the bundled models
# make lint    ruff and mypy
# make docs    the site in build/site, every link checked
# make release the source archive and the wheel in dist/, tried in an empty environment

PYTHON ?= python3
VENV   ?= .venv
# What to install where the environment has no torch yet. Example:
#   make setup VENV_FLAGS=--system-site-packages       (use the torch the machine already has)
TORCH  ?= torch==2.13.0
VENV_FLAGS ?=
# By file: tests of a file share models that are traced and compiled once a worker.
PYTEST_FLAGS ?= -n 2 --dist loadfile
DEMO_FLAGS ?=

BIN   := $(VENV)/bin
STAMP := $(VENV)/.focus-compile-installed

.PHONY: setup demo test test-all lint format docs release clean
setup: $(STAMP)

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "focus-compile needs Python 3.11 or newer; name one: make setup PYTHON=python3.12"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV_FLAGS) $(VENV)
	@$(BIN)/python -c 'import torch' 2>/dev/null || $(BIN)/python -m pip install $(TORCH)
	$(BIN)/python -m pip install -e '.[dev]'
	@touch $@

demo: setup
	$(BIN)/python -m focus_compile demo $(if $(POLICY),--policy $(POLICY)) $(DEMO_FLAGS)

# One thread a worker: the workers already use the cores.
test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_FLAGS)

test-all: setup
	$(BIN)/python -m pip install -q -e '.[dev,integrations]'
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_FLAGS) -m "not gpu and not release"

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: setup
	$(BIN)/python -m mkdocs build --strict

release: setup
	TORCH="$(TORCH)" .ci/check_release $(BIN)/python

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
