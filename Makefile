# make demo | test | lint | format | docs | clean
#
# PYTHON    the interpreter that .venv is made with, 3.11 or newer      make test PYTHON=python3.12
# PIP_ARGS  more arguments for pip, for instance to get PyTorch without CUDA on Linux:
#           make demo PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"
# ARGS      more arguments for pi0-demo or pytest                       make test ARGS="--run-slow"

PYTHON ?= python3
PIP_ARGS ?=
ARGS ?=
BIN := .venv/bin

.PHONY: help demo test lint format docs clean .venv

help:
	@sed -n 's/^# \{0,1\}//p' Makefile

demo: .venv
	@$(BIN)/pi0-demo $(ARGS)

test: .venv
	@$(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

lint: .venv
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

format: .venv
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

docs: .venv
	@$(BIN)/python -c 'import sphinx_book_theme, myst_parser' 2>/dev/null || \
	    $(BIN)/pip install --quiet --disable-pip-version-check -e ".[docs]" -c constraints.txt $(PIP_ARGS)
	@$(BIN)/python -m sphinx -q -W --keep-going -b html docs docs/_build
	@echo "docs/_build/index.html"

.venv: .venv/.installed

.venv/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version.split()[0]; sys.version_info >= (3, 11) or sys.exit( \
	    "This needs Python 3.11 or newer and $(PYTHON) is " + v + "; name another: make PYTHON=python3.12")'
	@echo "Installing into .venv: a few minutes, once."
	@$(PYTHON) -m venv .venv
	@$(BIN)/pip install --quiet --disable-pip-version-check -e ".[jax,torch,dev]" -c constraints.txt $(PIP_ARGS)
	@touch $@

clean:
	rm -rf .venv .cache .pytest_cache .mypy_cache .ruff_cache .hypothesis build docs/_build docs/reference *.egg-info
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
