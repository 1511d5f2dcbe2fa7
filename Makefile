# Every target works alone on a fresh clone: it makes .venv and installs into it first, once.
#   make test    the default test suite        make demo   every direction of the bundled model -> out/demo
#   make check   format, lint, types, docs     make fix    let ruff mend what it can
#   make docs    the documentation site -> out/site
#   make bench   decoding beside transformers' generate
# No system package is needed beyond Python 3.11+ with its venv module (Debian: python3-venv). Building the raw
# data sets also needs flite, espeak-ng and npm. Tests that use those engines, or drive the web page in a browser
# (Debian: chromium), are skipped where they are absent.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
JOBS ?= 2

.PHONY: setup demo test test-slow check docs fix bench clean
.DEFAULT_GOAL := test

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "anytoken needs Python 3.11 or newer, '$(PYTHON)' is $$($(PYTHON) -V 2>&1); try: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 2; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "'$(PYTHON)' has no venv module; on Debian: apt-get install python3-venv" >&2; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

setup: $(STAMP)

# One math thread a worker: two workers with two threads each are slower than two with one on two cores.
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(JOBS)

test-slow: $(STAMP)
	$(BIN)/python -m pytest -q -m slow

demo: $(STAMP)
	$(BIN)/anytoken demo --out out/demo

check: $(STAMP) docs
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# Broken links, unknown names in the API reference and pages outside the navigation are errors.
docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --config-file docs/site/mkdocs.yml

bench: $(STAMP)
	$(BIN)/anytoken bench generate

fix: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf out build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
