# Everything this project does, from a fresh clone with CPython 3.11 or later and make.
# Another Python: make test PYTHON=python3.12. More pytest options: make test ARGS="-k ridge".

PYTHON ?= python3
VENV   ?= .venv
ARGS   ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check
# The pinned version is meant: no word about newer ones.
export PYRIGHT_PYTHON_IGNORE_WARNINGS := 1

.PHONY: help demo test test-quick scripts lint format docs bench oldest newest clean
.NOTPARALLEL:  # two pips in one environment disturb each other

help:
	@echo "make demo    clean a training set of real digits (about two minutes)"
	@echo "make test    the test suite"
	@echo "make test-quick  one oracle a rule, every solver once: about a minute"
	@echo "make scripts the benchmarks, with tiny sizes, the examples and the demo, as tests"
	@echo "make lint    ruff and pyright"
	@echo "make format  mend what ruff can mend"
	@echo "make docs    the documentation, with its examples executed: docs/_build/html"
	@echo "make bench   time bilevax against its peers"
	@echo "make oldest  the test suite with the oldest supported dependencies"
	@echo "make newest  the test suite with the newest Python found and the newest dependencies"
	@echo "make clean   remove the environments and everything built"

demo: $(VENV)/.installed-demo
	$(BIN)/python -m bilevax demo $(ARGS)

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not script" $(ARGS)

test-quick: $(VENV)/.installed-test
	$(BIN)/python -m pytest -n 2 -m quick $(ARGS)

scripts: $(VENV)/.installed-test
	$(BIN)/python -m pytest -n 2 -m script $(ARGS)

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

# The shims of version managers are found and may not run: tried, not looked up.
NEWEST_PYTHON = $(shell for p in python3.13 python3.12 \
	$${PYENV_ROOT:-$$HOME/.pyenv}/versions/3.13*/bin/python3.13 \
	$${PYENV_ROOT:-$$HOME/.pyenv}/versions/3.12*/bin/python3.12; do \
	if $$p -c "" 2>/dev/null; then echo $$p; break; fi; done)

newest:
	@if [ -z "$(NEWEST_PYTHON)" ]; then echo "make newest: skipped, neither python3.13 nor python3.12 found"; \
	else $(MAKE) test VENV=.venv-newest PYTHON=$(NEWEST_PYTHON); fi

clean:
	rm -rf .venv .venv-oldest .venv-newest dist build docs/_build docs/auto_examples
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
