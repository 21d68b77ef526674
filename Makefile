# Every target sets up what it needs in .venv; `make help` lists them.

VENV := .venv
BIN := $(VENV)/bin
# The interpreter that .venv is made with: `make demo PYTHON=/path/to/python3.12`.
PYTHON ?=
PYTHONS := $(or $(PYTHON),python3 python3.13 python3.12 python3.11 python3.14 python)
INSTALL = $(BIN)/python -m pip install -qq --disable-pip-version-check \
	--constraint constraints.txt
SETUP := pyproject.toml constraints.txt

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow lint types bench docs dev clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' Makefile

demo: $(VENV)/.core  ## train and compare on the shipped CT slices, into runs/demo
	@$(BIN)/python -m jaxkd.main --config=configs/hlfd.py --workdir=runs/demo

test: $(VENV)/.dev  ## run the tests; `make test ARGS=tests/losses` for some of them
	@$(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

test-slow: $(VENV)/.dev  ## run the tests marked slow
	@$(BIN)/python -m pytest -n 2 --dist loadfile -m slow $(ARGS)

lint: $(VENV)/.dev  ## check style and format
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

types: $(VENV)/.dev  ## check types
	@PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(BIN)/pyright --pythonpath $(BIN)/python

bench: $(VENV)/.bench  ## measure the KD step against PyTorch; ARGS="--rounds=3" for options
	@$(BIN)/python bench/step.py $(ARGS)

docs: $(VENV)/.docs  ## build the documentation into site/
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

dev: $(VENV)/.dev  ## set up .venv with everything a developer needs

clean:  ## remove .venv, caches and built files; keep runs/
	rm -rf $(VENV) build dist site .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Stamps: a second call is immediate, a changed requirement installs again.
$(VENV)/.core: $(VENV)/.made $(SETUP)
	@echo "Installing jaxkd into $(VENV), about a minute ..."
	@$(INSTALL) --editable .
	@touch $@

$(VENV)/.dev $(VENV)/.bench $(VENV)/.docs: $(VENV)/.%: $(VENV)/.core
	@echo "Installing the extra '$*' into $(VENV), about a minute ..."
	@$(INSTALL) --editable '.[$*]'
	@touch $@

# An environment that is there already is kept if it can serve.
$(VENV)/.made:
	@usable='import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))'; \
	if ! $(BIN)/python -c "import pip; $$usable" >/dev/null 2>&1; then \
	  for python in $(PYTHONS); do \
	    if "$$python" -c "$$usable" >/dev/null 2>&1; then break; fi; python=; \
	  done; \
	  if [ -z "$$python" ]; then \
	    echo "jaxkd needs Python 3.11 or later with venv (tried: $(PYTHONS));" \
	      "install it or name one: make PYTHON=/path/to/python3.11" >&2; exit 1; \
	  fi; \
	  echo "Making $(VENV) with $$("$$python" --version) ..."; \
	  "$$python" -m venv --clear $(VENV) || exit 1; \
	fi; touch $@
