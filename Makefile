PYTHON ?= python3
VENV := .venv
STAMP := $(VENV)/.installed

.PHONY: venv demo test test-slow test-gpu test-deepspeed test-newest test-oldest test-window constraints quality style docs dist

venv: $(STAMP)

# Releases that have passed, so that this works next year, too.
$(STAMP): setup.py pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install -c constraints.txt -e ".[test,quality]"
	touch $(STAMP)

# One thread: minibatches this small give a second one nothing to do but wait, which takes several times as long.
demo: venv
	OMP_NUM_THREADS=1 $(VENV)/bin/python examples/language_modeling/run_enwik8.py examples/language_modeling/recipes/enwik8_demo.yaml

# One thread a worker: two workers that each take every core are slower than one.
test: venv
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n 2

test-slow: venv
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n 2 -m slow

# On a machine with a GPU.
test-gpu: venv
	$(VENV)/bin/python -m pytest tests/training/test_cuda.py

# DeepSpeed, the release that has passed, on two processes without a GPU. In an environment of its own: accelerate and TRL
# import it wherever they find it, and pip builds it from source.
.venv-deepspeed/.installed: setup.py constraints.txt
	$(PYTHON) -m venv .venv-deepspeed
	DS_BUILD_OPS=0 DS_ACCELERATOR=cpu .venv-deepspeed/bin/python -m pip install -c constraints.txt -e ".[test,deepspeed]" \
		deepspeed==0.19.8
	touch $@

test-deepspeed: .venv-deepspeed/.installed
	OMP_NUM_THREADS=1 .venv-deepspeed/bin/python -m pytest -n 0 tests/training/test_deepspeed.py

# The same tests with other releases, each in an environment of its own: whatever pip takes today, the oldest that setup.py
# admits, some between. Chosen tests only: make test-oldest TESTS="tests/test_config.py tests/training/test_trainer.py"
.venv-newest/.installed: PINS = :
.venv-oldest/.installed: PINS = $(PYTHON) tests/oldest.py
.venv-window/.installed: PINS = printf 'torch===2.9.1\ntransformers==5.0.0\n'

.venv-%/.installed: setup.py pyproject.toml tests/oldest.py
	$(PYTHON) -m venv $(@D)
	$(PINS) > $(@D)/constraints.txt
	$(@D)/bin/python -m pip install -c $(@D)/constraints.txt torch torchvision -e ".[test,quality]"
	touch $@

test-newest test-oldest test-window: test-%: .venv-%/.installed
	OMP_NUM_THREADS=1 .venv-$*/bin/python -m pytest -n 2 $(TESTS)

# Pins what `make test-newest` has passed with.
constraints: .venv-newest/.installed
	(head -n 2 constraints.txt && .venv-newest/bin/python -m pip list --format=freeze \
		| grep -vE '^(hf_latephase|pip|setuptools)==' | sed 's/^torch==/torch===/') > constraints.new
	mv constraints.new constraints.txt

quality: venv
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy hf_latephase

style: venv
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .

# Into site/; a link or a reference that leads nowhere is an error.
docs: venv
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict

# What would be published. build/ is made anew: setuptools packs whatever an earlier build left there.
dist: venv
	rm -rf build dist
	$(VENV)/bin/python -m build
	$(VENV)/bin/python -m twine check --strict dist/*
