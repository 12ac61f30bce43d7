# What pip installs of torch, e.g. make test TORCH="torch==2.14.1 torchvision==0.29.1" for releases of your choice. A
# torchvision works with the torch of its own release and build only: name both.
TORCH ?= torch torchvision
PYTHON ?= python3
VENV := .venv
STAMP := $(VENV)/.installed
OLDEST := .venv-oldest

.PHONY: venv demo test test-slow test-gpu test-oldest quality style dist

venv: $(STAMP)

# One pip call: torch is resolved with everything else, so the choice above holds.
$(STAMP): setup.py pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install $(TORCH) -e ".[test,quality]"
	touch $(STAMP)

# Threads that sleep while they wait: spinning ones lose most of their time when something else wants a core.
demo: venv
	OMP_WAIT_POLICY=PASSIVE $(VENV)/bin/python examples/run_enwik8.py examples/recipes/enwik8_demo.yaml

# One thread a worker: two workers that each take every core are slower than one.
test: venv
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n 2

test-slow: venv
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n 2 -m slow

# On a machine with a GPU.
test-gpu: venv
	$(VENV)/bin/python -m pytest tests/test_cuda.py

# The oldest releases that setup.py admits, read from it; everything else as new as they allow. Chosen tests only:
# make test-oldest TESTS="tests/test_config.py tests/test_trainer.py"
$(OLDEST)/.installed: setup.py pyproject.toml tests/oldest.py
	$(PYTHON) -m venv $(OLDEST)
	$(PYTHON) tests/oldest.py > $(OLDEST)/constraints.txt
	$(OLDEST)/bin/python -m pip install -c $(OLDEST)/constraints.txt torch torchvision -e ".[test]"
	touch $@

test-oldest: $(OLDEST)/.installed
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest -n 2 $(TESTS)

quality: venv
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy hf_latephase

style: venv
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .

# What would be published. build/ is made anew: setuptools packs whatever an earlier build left there.
dist: venv
	rm -rf build dist
	$(VENV)/bin/python -m build
	$(VENV)/bin/python -m twine check --strict dist/*
