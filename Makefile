# Every target does its own set-up.  See README.md.

VENV := .venv
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
RUN := $(VENV)/bin

.PHONY: setup demo test check docs clean

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "qdora needs Python 3.11 or newer; none was found. Name one: make PYTHON=..." >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(RUN)/python -m pip install --disable-pip-version-check --quiet -c constraints.txt -e ".[dev]"
	@touch $@

demo: setup
	$(RUN)/qdora demo

check: setup
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/mypy
	$(RUN)/lint-imports

test: check
	OMP_NUM_THREADS=1 $(RUN)/pytest -n 2 --dist loadfile

docs: setup
	NO_MKDOCS_2_WARNING=1 $(RUN)/mkdocs build --strict
	@echo "open site/index.html; to search in it: python3 -m http.server -d site"

clean:
	rm -rf $(VENV) build dist site *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
