# Everything this project does, from a fresh clone with CPython 3.11 or later and make.
# Another Python: make test PYTHON=python3.12. More pytest options: make test ARGS="-k ridge".

PYTHON ?= python3
VENV   ?= .venv
ARGS   ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check
# The pinned version is meant: no word about newer ones.
export PYRIGHT_PYTHON_IGNORE_WARNINGS := 1

.PHONY: help demo test lint format docs bench oldest clean
.NOTPARALLEL:  # two pips in one environment disturb each other

help:
	@echo "make demo    clean a training set of real digits (about two minutes)"
	@echo "make test    the whole test suite"
	@echo "make lint    ruff and pyright"
	@echo "make format  mend what ruff can mend"
	@echo "make docs    the documentation, with its examples executed: docs/_build/html"
	@echo "make bench   time bilevax against its peers"
	@echo "make oldest  the test suite with the oldest supported dependencies"
	@echo "make clean   remove the environments and everything built"

demo: $(VENV)/.installed-demo
	$(BIN)/python -m bilevax demo $(ARGS)

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest -n 2 $(ARGS)

lint: $(VENV)/.installed-lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(VENV)/.installed-lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.installed-docs
	$(BIN)/python -m sphinx -W --keep-going -q -E -b html docs docs/_build/html $(ARGS)
	@echo "docs/_build/html/index.html"

bench: $(VENV)/.installed-bench
	@set -e; for script in $(filter-out benchmarks/_%,$(wildcard benchmarks/*.py)); do \
		echo "== $$script"; $(BIN)/python $$script $(ARGS); done

oldest:
	$(MAKE) test VENV=.venv-oldest PIP_CONSTRAINT=constraints-oldest.txt

clean:
	rm -rf .venv .venv-oldest dist build docs/_build docs/auto_examples
	rm -rf .pytest_cache .ruff_cache .hypothesis

# One environment; each extra is installed once, and again only when pyproject.toml changes.
# The installation is editable: a change of the code needs none.
$(VENV)/.installed-%: pyproject.toml $(VENV)/.created
	@echo "Installing bilevax[$*] into $(VENV): some minutes the first time ..."
	@$(PIP) install --editable ".[$*]"
	@touch $@

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; v = sys.version_info; \
		v >= (3, 11) or sys.exit("bilevax needs Python 3.11 or later, not %d.%d: " \
		"make ... PYTHON=/path/to/python3.11" % v[:2])'
	$(PYTHON) -m venv $(VENV)
	@touch $@
