# Every target makes its own set-up: on a fresh machine with Python 3.11 or newer, `make demo` is the only command to type.

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# The stamps say which set is installed; they are redone when either file that defines it changes.
CORE := .venv/.core-installed
DEV := .venv/.dev-installed
DOCS := .venv/.docs-installed
DEFINED_BY := pyproject.toml constraints.txt
INSTALLABLE := .venv/.installable
NEWEST_BIN := .venv-newest/bin
NEWEST := .venv-newest/.installed

TORCH := $(shell sed -n 's/^torch==//p' constraints.txt)
TORCH_CPU := https://download.pytorch.org/whl/cpu
MODELS := digits-flow digits-classifier digits-judge digits-diffusion

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow test-newest lint format mutants bench docs pretrain release-check clean

help: ## print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(CORE) ## tune the digit model toward even digits, from install to report
	rm -rf runs/demo
	$(BIN)/tiltflow train digits-even --output runs/demo
	@echo "Open $(CURDIR)/runs/demo/report.html"

test: $(DEV) ## run the fast tests and the doctests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" -n 2 --dist worksteal

test-slow: $(DEV) ## run the slow tests
	$(BIN)/python -m pytest -m slow

test-newest: $(NEWEST) ## run the fast tests with the newest torch that pip finds, in .venv-newest
	@$(NEWEST_BIN)/python -c 'import torch; print("torch", torch.__version__)'
	OMP_NUM_THREADS=1 $(NEWEST_BIN)/python -m pytest -m "not slow" -n 2 --dist worksteal

lint: $(DEV) $(INSTALLABLE) ## check formatting, lint, types, and that every extra can be installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy --strict src

format: $(DEV) ## format the code and fix what can be fixed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

mutants: $(DEV) ## change one operator of the maths at a time: does a test notice?
	$(BIN)/python scripts/mutants.py

bench: $(CORE) ## measure the speed
	$(BIN)/python benchmarks/speed.py

docs: $(DOCS) ## build the documentation site into build/site; a link that leads nowhere is an error
	$(BIN)/python scripts/pages.py
	$(BIN)/zensical build --strict
	@echo "Open $(CURDIR)/build/site/index.html"

pretrain: $(CORE) ## train the shipped models again into runs/pretrain: make pretrain DATA=path/to/mnist.npz
	@test -n "$(DATA)" || { echo "make pretrain needs the data: make pretrain DATA=path/to/mnist.npz" >&2; exit 2; }
	@set -e; for model in $(MODELS); do \
		echo "tiltflow pretrain $$model"; \
		$(BIN)/tiltflow pretrain $$model --data "$(DATA)" --output runs/pretrain/$$model; \
	done

release-check: $(DEV) ## build what would be published, and use it from an empty environment
	OMP_NUM_THREADS=2 $(BIN)/python scripts/release_check.py

clean: ## remove caches and build output; .venv and runs stay
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache
	find src tests scripts -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "tiltflow needs Python 3.11 or newer; name one with: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -m venv .venv && $(PIP) --version >/dev/null || \
		{ rm -rf .venv; echo "$(PYTHON) cannot make a virtual environment with pip (Debian and Ubuntu: apt install python3-venv)" >&2; exit 1; }

# The default torch for Linux brings gigabytes of CUDA. Without an NVIDIA GPU, the CPU build is taken if it can be had;
# if not, the install below takes the default.
$(CORE): $(DEFINED_BY) | $(BIN)/python
	@echo "Installing tiltflow into .venv; the first time takes a few minutes"
	@if [ "$$(uname -s)" = Linux ] && ! command -v nvidia-smi >/dev/null; then \
		$(PIP) install --quiet --no-deps --retries 0 --timeout 15 --index-url $(TORCH_CPU) "torch==$(TORCH)" 2>/dev/null || true; \
	fi
	@$(PIP) install --quiet -c constraints.txt -e .
	@touch $@

$(DEV): $(CORE)
	@echo "Installing the tools for development"
	@$(PIP) install --quiet -c constraints.txt -e '.[dev]'
	@touch $@

$(DOCS): $(CORE)
	@echo "Installing the tools for the documentation"
	@$(PIP) install --quiet -c constraints.txt -e '.[docs]'
	@touch $@

# Asked again where what is declared has changed.
$(INSTALLABLE): $(DEFINED_BY) scripts/check_install.py | $(DEV)
	$(BIN)/python scripts/check_install.py $@

# The pinned set, but for torch and what it brings. It may be gigabytes: pip takes the default build of torch here.
$(NEWEST): $(DEFINED_BY) $(DEV)
	@echo "Installing the newest torch into .venv-newest"
	@$(BIN)/python -m venv --clear .venv-newest
	@sed -E '/^(torch|setuptools)==/d' constraints.txt > .venv-newest/constraints.txt
	@$(NEWEST_BIN)/python -m pip --disable-pip-version-check install --quiet -c .venv-newest/constraints.txt -e '.[dev]'
	@touch $@
