# Needs Python 3.11, git and a C++ compiler (DeepSpeed compiles small ops at first use).
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
export TOKENIZERS_PARALLELISM := false

.PHONY: quickstart test test-fast test-all test-faults check format golden bench faults screenshots lock clean help

help: ## Show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

quickstart: $(STAMP) ## Install, then sweep λ × learning rate × model size on the built-in pairs (5 minutes on 2 cores)
	$(BIN)/orpo-ray sweep experiments/quickstart.yaml

# Two tests at a time, the tests of a file in one process; tests/integration, which takes longest, begins.
TWO := -n 2 --dist loadfile --no-loadscope-reorder

test: $(STAMP) ## Install, then run the fast tests and one real run of each kind (at most 12 minutes on 2 cores)
	$(BIN)/python -m pytest $(TWO) -m "not faults and (core or not slow)"

test-fast: $(STAMP) ## Run the tests that start neither Ray nor training processes (3 minutes)
	$(BIN)/python -m pytest $(TWO) -m "not faults and not slow"

test-all: $(STAMP) ## Run all tests but those of test-faults (at most 45 minutes)
	$(BIN)/python -m pytest $(TWO) -m "not faults and not alone"
	$(BIN)/python -m pytest -m "not faults and alone"

test-faults: $(STAMP) ## Run the tests that kill processes and nodes, some as root (15 minutes)
	$(BIN)/python -m pytest -m faults

check: $(STAMP) ## Check lint, format, types and import rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMP) ## Apply the formatter and the safe fixes
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

golden: $(STAMP) ## Rewrite the golden losses; look at the diff before you commit it
	$(BIN)/python -m tests.golden.make_golden

bench: $(STAMP) ## Measure speed and memory against TRL, Liger and LLaMA-Factory's loss (hours), into benchmarks/README.md
	$(BIN)/python -m benchmarks.throughput
	$(BIN)/python -m benchmarks.memory
	$(BIN)/python -m benchmarks.scaling
	$(BIN)/python -m benchmarks.limit --precision fp32
	$(BIN)/python -m benchmarks.limit --precision bf16
	$(BIN)/python -m benchmarks.checkpoint
	$(BIN)/python -m benchmarks.search_quality
	$(BIN)/python -m benchmarks.pretraining
	$(BIN)/python -m benchmarks.report

faults: $(STAMP) ## Inject faults into real sweeps, then 200 random ones (hours), into docs/reliability.md
	$(BIN)/python -m tests.faults
	$(BIN)/python -m tests.faults.soak

screenshots: $(STAMP) ## Take the README's pictures of a finished quickstart (needs chromium and chromium-driver)
	$(BIN)/python -m docs.make_screenshots runs/quickstart

lock: $(STAMP) ## Write constraints.txt from what is installed
	{ echo "# The versions everything here was tested with. Made by: make lock"; \
	  $(BIN)/pip freeze --exclude-editable | sed 's/+cpu$$//' ; } > constraints.txt

clean: ## Remove the environment and caches, but not runs/
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache

# torch is installed first, at its pinned version, so that later installs keep this build.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet "$$(grep '^torch==' constraints.txt)" setuptools wheel
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev,oracle]'
	touch $@
