# Everything a fresh machine needs is Python 3.11 or later and make. Each target sets up .venv itself.
#
#   make demo     the main job on the built-in section: a SpatialData store, a picture and a score table
#   make test     the tests
#   make reliability  bad input, damage, kills and properties by the thousand, with a table of figures
#   make docs     the documentation, warnings are errors
#   make tutorials  the same, and keep the outputs of the tutorials in tutorials/
#   make lint     ruff: rules and format
#   make types    mypy: do types agree, with those of PyTorch and numpy too
#
# PYTHON=python3.12 picks the interpreter, CONSTRAINTS= (empty) lifts the pins, PYTEST_ARGS and SPHINX_ARGS are passed on.

PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= .ci/constraints.txt
DEMO_OUT ?= demo-output

BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install $(if $(CONSTRAINTS),--constraint $(CONSTRAINTS))

.PHONY: help demo test reliability docs tutorials lint types format clean
.NOTPARALLEL:
.DELETE_ON_ERROR:

help:
	@sed -n '2,/^$$/s/^# \{0,1\}//p' Makefile

demo: $(VENV)/.installed-test
	$(BIN)/python -m stgen demo --out "$(DEMO_OUT)"

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest $(PYTEST_ARGS)

reliability: $(VENV)/.installed-test
	OMP_NUM_THREADS=1 $(BIN)/python tests/reliability $(RELIABILITY_ARGS)

docs: $(VENV)/.installed-docs
	rm -rf docs/_build docs/generated docs/tutorials
	$(BIN)/python -m sphinx --fail-on-warning --keep-going -b html $(SPHINX_ARGS) docs docs/_build/html
	@echo "The documentation is in docs/_build/html/index.html"

tutorials: docs
	$(BIN)/python docs/keep_outputs.py

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed-dev
	$(BIN)/mypy

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) docs/_build docs/generated docs/tutorials "$(DEMO_OUT)"

# One stamp per extra: made when the installation succeeded, remade when pyproject.toml or the pins change.
$(VENV)/.installed-%: pyproject.toml $(wildcard $(CONSTRAINTS)) | $(BIN)/python
	@echo "Installing stgen and its '$*' requirements into $(VENV): some minutes the first time, then never again."
	$(PIP_INSTALL) --editable ".[$*]"
	@touch $@

$(BIN)/python:
	@command -v "$(PYTHON)" >/dev/null || \
	  { echo "There is no '$(PYTHON)' here. Name a Python 3.11 or later: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "stgen needs Python 3.11 or later, and '$(PYTHON)' is $$("$(PYTHON)" --version 2>&1)." \
	         "Name another: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@"$(PYTHON)" -m venv "$(VENV)" || \
	  { rm -rf "$(VENV)"; echo "'$(PYTHON) -m venv' failed (see above); on Debian and Ubuntu the package" \
	                           "python3-venv brings it." >&2; exit 1; }
