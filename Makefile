# make demo   a first generated adapter, from nothing but Python 3.11 or newer
# make test   everything that a change must pass: lint, type check, tests
# make lint   ruff and the type check only
# make docs   the documents as a site, strictly built: site/index.html, readable without a network
# Overridable: PYTHON (the interpreter that the virtual environment is made with), VENV (its folder).
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test lint docs

demo: $(VENV)/.installed-demo
	$(BIN)/cond-pdiff demo

test: lint
	$(BIN)/python -m pytest

lint: $(VENV)/.installed-test
	$(BIN)/python -m ruff check .
	$(BIN)/python tests/typecheck.py

docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build

# One stamp for each extra: a second call installs nothing, unless pyproject.toml has changed.
$(VENV)/.installed-%: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --disable-pip-version-check -e '.[$*]'
	touch $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed (make PYTHON=...)" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
