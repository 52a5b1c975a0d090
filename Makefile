# `make demo` and `make test` need Python 3.10 or later and a C++ compiler;
# everything else they install into .venv, on the first run.

# The Python that .venv is made from: `make env PYTHON=python3.12`.
PYTHON ?= python3

# Threads that wait by spinning starve those of another process.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: env demo test test-all reproduce lint clean

env:
	@$(PYTHON) requirements/install.py

demo: env
	.venv/bin/python tools/demo.py

test: env
	.venv/bin/python -m pytest -m 'not exhaustive'

test-all: env
	.venv/bin/python -m pytest

# Measures every figure of docs/en/reproduction.md anew.
reproduce: env
	.venv/bin/python tools/reproduce.py

lint: env
	.venv/bin/ruff check
	.venv/bin/mypy

# Leaves .venv, data, checkpoints and work_dirs, which cost long to remake.
clean:
	rm -rf build dist *.egg-info
	rm -rf .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find configs mmtune requirements tests tools -name __pycache__ \
	    -prune -exec rm -rf {} +
