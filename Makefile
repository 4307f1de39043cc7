# make serve | test | test-full | check | format | bench | clean
#
# Every target creates .venv and installs what it needs the first time.
#   PYTHON=python3.12     the interpreter for .venv (3.11 or newer)
#   TORCH_INDEX_URL=...   a package index with the torch build you want. Example: PyTorch's CPU
#                         wheels, https://download.pytorch.org/whl/cpu, save gigabytes where the
#                         default index offers CUDA builds only.
#   ARGS="..."            more arguments, e.g. make serve ARGS="--port 9000", make test ARGS="-k cli"
#   BENCH="..."           which benchmark programs, default all of benchmarks/[a-z]*.py

VENV ?= .venv
ARGS ?=
BENCH ?= $(wildcard benchmarks/[a-z]*.py)
SHELL := /bin/bash
PY := $(VENV)/bin/python
RUN_STAMP := $(VENV)/.installed-server
DEV_STAMP := $(VENV)/.installed-dev
INSTALL_INPUTS := pyproject.toml constraints-cpu.txt scripts/install.sh

# The folder `kernels/` must not be found as a top-level module: see docs/architecture.md.
export PYTHONSAFEPATH := 1

.PHONY: serve test test-full check format bench clean

serve: $(RUN_STAMP)
	$(VENV)/bin/tierkv serve $(ARGS)

# Two test files at a time, one thread each: threads of two processes on two cores wait for each other.
test: $(DEV_STAMP)
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist loadfile -m "not full" $(ARGS)

test-full: $(DEV_STAMP)
	$(PY) scripts/test_full.py $(ARGS)

check: $(DEV_STAMP)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(VENV)/bin/lint-imports --cache-dir .import_linter_cache
	$(PY) -m pytest -q tests/test_layering.py tests/test_limits.py

format: $(DEV_STAMP)
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

bench: $(DEV_STAMP)
	@set -e; for program in $(BENCH); do \
		echo "== $$program"; \
		PYTHONPATH=benchmarks $(PY) $$program $(ARGS); \
	done

clean:
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache

$(RUN_STAMP): $(INSTALL_INPUTS)
	scripts/install.sh $(VENV) server
	@touch $@

# The development environment includes what `serve` needs.
$(DEV_STAMP): $(INSTALL_INPUTS)
	scripts/install.sh $(VENV) dev
	@touch $(RUN_STAMP) $@
