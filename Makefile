# The two commands of a new user are `make demo` and `make test`; both set up everything they need.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Processes that share the tests; each starts up to four ranks of its own (about 3 GB of memory).
TEST_WORKERS ?= 2
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt

.PHONY: demo test lint format bench slurm-packages slurm-lab clean help

help:
	@echo "make demo   pretrain a small tensorized GPT-2 on text found on this machine (CPU, minutes)"
	@echo "make test   lint, types, import contracts and all tests"
	@echo "make lint   lint, types and import contracts alone"
	@echo "make format format the code"
	@echo "make bench  quick benchmarks"
	@echo "make slurm-lab  start a SLURM cluster of virtual nodes on this machine (root)"
	@echo "make clean  remove the virtual environment and caches"

demo: $(VENV)/.installed
	$(BIN)/mpotrain demo

test: lint slurm-packages
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest -n $(TEST_WORKERS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.installed-dev
	$(BIN)/python -m benchmarks.layer --quick
	$(BIN)/python -m benchmarks.moe --experts 8 --rounds 3

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit("mpotrain needs Python 3.11 or newer" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)

# torch comes first: packages that look for it while they are built must find this one.
$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) torch numpy
	$(PIP) --editable .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) --editable '.[dev]'
	@touch $@

# Tests on a SLURM cluster are left out, with the reason, where its packages cannot be installed.
slurm-packages:
	@slurm/lab/install.sh || echo "tests on a SLURM cluster will be left out"

slurm-lab: $(VENV)/.installed-dev slurm-packages
	@$(BIN)/python slurm/lab up 4 >/dev/null
	@$(BIN)/python slurm/lab status
	@echo
	@echo 'in this shell:   eval "$$($(BIN)/python slurm/lab env)"'
	@echo 'how to go on:    docs/slurm-lab.md'
	@echo 'take it down:    $(BIN)/python slurm/lab down'

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
