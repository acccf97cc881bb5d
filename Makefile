PYTHON ?= python3
VENV ?= .venv
ARGS ?=
# Each worker begins with a half of the tests in their order, so that it makes the backbones of that half only.
PYTEST_ARGS ?= -n auto --dist worksteal

BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt
# Shown if the line before it fails.
LOG := $(VENV)/install.log
OR_LOG := > $(LOG) 2>&1 || { cat $(LOG); exit 1; }
SOURCES := point_peft tests tools benchmarks examples setup.py
SETUP := setup.py pyproject.toml constraints.txt point_peft/version.py

.PHONY: help quickstart demo check test pages docs gpu lint types smoke clean
.DELETE_ON_ERROR:

help:
	@echo 'make quickstart  make .venv, install, and run the main job; ARGS="--help" says what it takes'
	@echo 'make demo        install, and open the page to try adapters; ARGS="--port 8000" and the like go to it'
	@echo 'make check       a minute: lint, types and a few quick tests; before every commit'
	@echo 'make test        lint, types and the suite, but for make pages; PYTEST_ARGS goes to pytest'
	@echo 'make pages       the tests of the site, the page to try, the tour and the notebook, in a browser'
	@echo 'make docs        the site, into build/site; a warning is an error'
	@echo 'make gpu         on a machine with a GPU: what can only be known there, into one folder; at most six minutes'
	@echo 'make lint, make types, make smoke    a part of make check'
	@echo 'make clean       remove .venv and all that was made'
	@echo 'PYTHON=python3.12 VENV=.venv312 choose the interpreter and the environment'

quickstart: $(VENV)/.examples
	@start=$$(date +%s) && $(BIN)/python -m examples.quickstart $(ARGS) && \
	echo "all of it, after installation, took $$(($$(date +%s) - start)) s"

demo: $(VENV)/.demo
	$(BIN)/point-peft demo $(ARGS)

check: lint types smoke

test: lint types
	$(BIN)/python -m pytest -m 'not pages' $(PYTEST_ARGS)

pages: $(VENV)/.test
	$(BIN)/python -m pytest -m pages $(PYTEST_ARGS)

# The variable: what the theme says of its future is no warning of ours.
docs: $(VENV)/.test
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --strict $(ARGS)
	@echo 'look at it: $(BIN)/python -m http.server --bind 127.0.0.1 --directory build/site'

gpu: $(VENV)/.test
	$(BIN)/python -m tools.gpu $(ARGS)

lint: $(VENV)/.test
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)

types: $(VENV)/.test
	$(BIN)/mypy $(SOURCES)

smoke: $(VENV)/.test
	$(BIN)/python -m pytest $(PYTEST_ARGS) -m smoke

# pip is the last thing that venv puts in place.
$(BIN)/pip:
	@$(PYTHON) -m venv $(VENV)

# A stamp says what was installed; it is older than what it was installed from as soon as that changes.
$(VENV)/.examples: $(SETUP) | $(BIN)/pip
	@echo 'installing point_peft and what the examples need into $(VENV): some minutes the first time'
	@$(PIP_INSTALL) -e '.[examples]' $(OR_LOG)
	@touch $@

$(VENV)/.demo: $(SETUP) | $(BIN)/pip
	@echo 'installing point_peft and the page to try into $(VENV): some minutes the first time'
	@$(PIP_INSTALL) -e '.[demo]' $(OR_LOG)
	@touch $@

$(VENV)/.test: $(SETUP) | $(BIN)/pip
	@echo 'installing point_peft and what the tests need into $(VENV): some minutes the first time'
	@$(PIP_INSTALL) -e '.[test,examples]' $(OR_LOG)
	@touch $@ $(VENV)/.examples $(VENV)/.demo

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find point_peft tests tools benchmarks examples -name __pycache__ -type d -prune -exec rm -rf {} +
