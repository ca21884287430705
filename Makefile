# Each target does its own set-up, in the virtual environment .venv of this clone, and repeats it when pyproject.toml
# changes. Variables to override on the command line:
#   PYTHON  the interpreter to make the environment with (3.11 or newer)
#   MODEL   what `make serve` serves
#   TORCH   the torch to install first; TORCH= leaves the choice to pip, or keeps a torch that .venv already has

PYTHON ?= python3
TORCH ?= torch==2.13.0
MODEL ?= examples/demo_model

VENV := .venv
BIN := $(VENV)/bin
# bench_engine wants the machine for itself, for an hour: it is run by hand.
BENCHES := $(sort $(filter-out benchmarks/bench_engine.py,$(wildcard benchmarks/bench_*.py)))

# The root of the repository is the package: without this, `python x.py` and `python -m` here would put folders named
# `kernels` or `comm` in front of installed packages of those names.
export PYTHONSAFEPATH := 1

.DEFAULT_GOAL := help
.PHONY: help demo serve test check lint types layers proto bench clean

help: ## list the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /\1\t/' \
		| while IFS="$$(printf '\t')" read -r name text; do printf '  make %-8s %s\n' "$$name" "$$text"; done

demo: $(VENV)/.cluster ## deploy the bundled model on a Ray of its own, send it several prompts, watch answers grow
	@$(BIN)/slipstream demo

serve: $(VENV)/.runtime ## serve the bundled model with OpenAI's API; MODEL= names another, SERVE_ARGS= adds options
	@$(BIN)/slipstream serve $(MODEL) $(SERVE_ARGS)

test: $(VENV)/.dev ## run the tests (no GPU, minutes)
	$(BIN)/python -m pytest $(PYTEST_ARGS)

check: lint types layers ## ruff, strict type check, layer rules

lint: $(VENV)/.dev ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# mypy names modules after folders, and a clone may be called anything: it sees the root through a link named slipstream.
types: $(VENV)/.dev ## mypy, strict
	@mkdir -p $(VENV)/typecheck && ln -sfn ../.. $(VENV)/typecheck/slipstream
	MYPYPATH=$(VENV)/typecheck $(BIN)/python -m mypy -p slipstream

layers: $(VENV)/.dev ## who may import whom, and the limits of size
	$(BIN)/python -m pytest -q tests/architecture

proto: $(VENV)/.dev ## write the protocols' Python code anew from their .proto files
	$(BIN)/python tests/rpc/proto_codegen.py

bench: $(VENV)/.dev ## run the benchmarks; results go to benchmarks/results
	@mkdir -p benchmarks/results
	@set -e; for bench in $(BENCHES); do echo "== $$bench"; \
		$(BIN)/python $$bench --json benchmarks/results/$$(basename $$bench .py).json; done

clean: ## remove caches and build products (the environment stays; to renew it: rm -rf .venv)
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis $(VENV)/typecheck
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "Slipstream needs Python 3.11 or newer, and '$(PYTHON)' is" \
			"$$($(PYTHON) --version 2>&1). Name another one: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.runtime: $(VENV)/.created pyproject.toml
	@echo "== installing the runtime into $(VENV) (once; torch is the large part)"
	$(if $(TORCH),$(BIN)/python -m pip install --quiet "$(TORCH)")
	$(BIN)/python -m pip install --quiet --editable '.[runtime]'
	@touch $@

$(VENV)/.cluster: $(VENV)/.runtime
	@echo "== installing Ray into $(VENV) (once)"
	$(BIN)/python -m pip install --quiet --editable '.[cluster]'
	@touch $@

$(VENV)/.dev: $(VENV)/.runtime
	@echo "== installing the tools into $(VENV) (once)"
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@
