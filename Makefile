# make quickstart   set up .venv and run the main job
# make test         set up .venv and run lint, types and the tests
# make lint, make types, make clean
#
# PYTHON is the interpreter that makes the environment, VENV where it lies; ARGS goes to the quickstart, PYTEST_ARGS to
# pytest.

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
PYTEST_ARGS ?= -n auto

BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt
SOURCES := point_peft tests tools benchmarks examples setup.py
SETUP := setup.py pyproject.toml constraints.txt point_peft/version.py

.PHONY: quickstart test lint types clean
.DELETE_ON_ERROR:

quickstart: $(VENV)/.examples
	$(BIN)/python -m examples.quickstart $(ARGS)

test: lint types
	$(BIN)/python -m pytest $(PYTEST_ARGS)

lint: $(VENV)/.test
	$(BIN)/ruff check $(SOURCES)

types: $(VENV)/.test
	$(BIN)/mypy $(SOURCES)

# pip is the last thing that venv puts in place.
$(BIN)/pip:
	$(PYTHON) -m venv $(VENV)

# A stamp says what was installed; it is older than what it was installed from as soon as that changes.
$(VENV)/.examples: $(SETUP) | $(BIN)/pip
	$(PIP_INSTALL) -e '.[examples]'
	touch $@

$(VENV)/.test: $(SETUP) | $(BIN)/pip
	$(PIP_INSTALL) -e '.[test,examples]'
	touch $@ $(VENV)/.examples

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find point_peft tests tools benchmarks examples -name __pycache__ -type d -prune -exec rm -rf {} +
