# Needs Python 3.11, git and a C++ compiler (DeepSpeed compiles small ops at first use).
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
export TOKENIZERS_PARALLELISM := false

.PHONY: quickstart test test-fast test-faults check format golden bench faults screenshots lock clean help

help: ## This list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

quickstart: $(STAMP) ## Install, then sweep λ × learning rate × model size on the built-in pairs (minutes on 2 cores)
	$(BIN)/orpo-ray sweep experiments/quickstart.yaml

test: $(STAMP) ## Install, then run all tests but test-faults
	$(BIN)/python -m pytest

test-fast: $(STAMP) ## The tests that need neither Ray nor several processes, in minutes
	$(BIN)/python -m pytest -m "not slow"

test-faults: $(STAMP) ## The tests of kills and lost nodes, some as root (15 minutes)
	$(BIN)/python -m pytest -m faults

check: $(STAMP) ## Lint, format, types, import rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMP) ## Apply the formatter and the safe fixes
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

golden: $(STAMP) ## Write the golden losses anew; look at the diff before you commit it
	$(BIN)/python -m tests.golden.make_golden

bench: $(STAMP) ## Speed and memory against TRL, Liger, LLaMA-Factory's loss (hours), into benchmarks/README.md
	$(BIN)/python -m benchmarks.throughput
	$(BIN)/python -m benchmarks.memory
	$(BIN)/python -m benchmarks.scaling
	$(BIN)/python -m benchmarks.limit --precision fp32
	$(BIN)/python -m benchmarks.limit --precision bf16
	$(BIN)/python -m benchmarks.checkpoint
	$(BIN)/python -m benchmarks.search_quality
	$(BIN)/python -m benchmarks.pretraining
	$(BIN)/python -m benchmarks.report

faults: $(STAMP) ## Faults done to real sweeps, then 200 at random (hours), into docs/reliability.md
	$(BIN)/python -m tests.faults
	$(BIN)/python -m tests.faults.soak

screenshots: $(STAMP) ## Pictures of the README from a finished quickstart (needs chromium and chromium-driver)
	$(BIN)/python -m docs.make_screenshots runs/quickstart

lock: $(STAMP) ## Write constraints.txt from what is installed
	{ echo "# The versions everything here was tested with. Made by: make lock"; \
	  $(BIN)/pip freeze --exclude-editable | sed 's/+cpu$$//' ; } > constraints.txt

clean: ## Remove the environment and caches, not runs/
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache

# torch comes first and pinned: whatever is resolved later then keeps this build.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet "$$(grep '^torch==' constraints.txt)" setuptools wheel
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev,oracle]'
	touch $@
