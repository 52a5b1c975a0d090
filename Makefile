# `make demo` and `make test` need Python 3.10 or later and a C++ compiler;
# everything else they install into .venv, on the first run.

# The Python that .venv is made from: `make env PYTHON=python3.12`.
PYTHON ?= python3

# Threads that wait by spinning starve those of another process.
export OMP_WAIT_POLICY ?= PASSIVE

# A process takes up to three GB.
PYTEST = .venv/bin/python -m pytest --numprocesses auto --maxprocesses 4 \
    --dist worksteal

.PHONY: env demo test test-core test-callbacks test-all sweep train
.PHONY: reproduce lint docs wheel clean

env:
	@$(PYTHON) requirements/install.py

demo: env
	.venv/bin/python tools/demo.py

test: env
	$(PYTEST) -m 'not exhaustive'

# What needs torch alone, in a few minutes: `make test-core` with the torch of
# .venv, `make test-core TORCH=2.4` with that one in an environment of its own.
CORE = tests/behaviours tests/functional tests/layers/test_calls.py \
    tests/layers/test_frozen.py tests/matching tests/test_api.py \
    tests/test_native.py tests/test_report.py tests/test_structure.py

ifdef TORCH
CORE_VENV = build/torch-$(TORCH)
test-core:
	$(PYTHON) -m venv $(CORE_VENV)
	$(CORE_VENV)/bin/python -m pip install --quiet 'torch==$(TORCH).*' numpy \
	    pytest pytest-xdist hypothesis --editable .
	$(CORE_VENV)/bin/python -m mmtune.collect_env
	$(subst .venv,$(CORE_VENV),$(PYTEST)) -m 'not slow and not exhaustive' \
	    $(CORE)
else
test-core: env
	$(PYTEST) -m 'not slow and not exhaustive' $(CORE)
endif

# The callbacks, with Lightning and Hugging Face's Trainer themselves.
CALLBACKS_VENV = build/callbacks
test-callbacks:
	$(PYTHON) -m venv $(CALLBACKS_VENV)
	$(CALLBACKS_VENV)/bin/python -m pip install --quiet \
	    pytest pytest-xdist hypothesis --editable '.[lightning,huggingface]'
	$(subst .venv,$(CALLBACKS_VENV),$(PYTEST)) \
	    tests/integrations/test_lightning.py \
	    tests/integrations/test_huggingface.py

test-all: env
	$(PYTEST)

# Compares the networks of a library with stock: `make sweep LIB=timm`.
sweep: env
	@.venv/bin/python -m tests.sweeps.environment $(LIB)
	OMP_NUM_THREADS=1 .venv-sweeps/$(LIB)/bin/python -m tests.sweeps $(LIB)
	.venv/bin/python docs/render.py

# Trains with a library's own trainer, against stock: `make train LIB=mmpose`
# (or mmpretrain, mmseg, mmyolo, ultralytics).
train: env
	@.venv/bin/python -m tests.sweeps.environment $(LIB)
	.venv-sweeps/$(LIB)/bin/python -m pytest -k $(LIB) \
	    tests/integrations/test_openmmlab.py \
	    tests/integrations/test_ultralytics.py

# Measures every figure of docs/en/reproduction.md anew.
reproduce: env
	.venv/bin/python tools/reproduce.py

lint: env
	.venv/bin/ruff check
	.venv/bin/mypy

# Builds the site into docs/_build/html; a warning or a dead link is an error.
docs: env
	@.venv/bin/python requirements/install.py docs
	.venv/bin/python -m sphinx --builder html --fail-on-warning --keep-going \
	    --fresh-env --quiet --conf-dir docs/en . docs/_build/html
	@echo 'The first page is docs/_build/html/index.html.'

# Builds the wheel and the source archive into dist/, and checks both.
wheel: env
	@.venv/bin/python requirements/install.py release
	rm -rf dist
	.venv/bin/python -m build --no-isolation
	.venv/bin/python -m twine check --strict dist/*

# Leaves .venv, data, checkpoints and work_dirs, which cost long to remake.
clean:
	rm -rf build dist docs/_build *.egg-info
	rm -rf .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find configs mmtune requirements tests tools -name __pycache__ \
	    -prune -exec rm -rf {} +
