# Two commands do everything: `make demo` and `make test`. Both set up .venv on their first run.
PYTHON ?= python3
VENV ?= .venv
MM ?= mm
BIN := $(VENV)/bin
PYTEST := $(BIN)/python -m pytest

TASK ?= detection
DEMO_detection := faster-rcnn_rdnet-nano_fpn_8e_digits
DEMO_segmentation := upernet_rdnet-nano_400i_digits-192x192
DEMO := configs/$(TASK)/demo/$(DEMO_$(TASK)).py
WORK := work_dirs/$(DEMO_$(TASK))

# Threads that wait for one another must sleep, not spin: with a busy neighbour on a small machine
# spinning has been seen to make a training step ten times as long.
export OMP_WAIT_POLICY ?= passive

.PHONY: help setup demo demo-segmentation test test-fast test-openmmlab lint format check tested

help:  ## show this list
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:[^#]*## /: /' | column -t -s ':'

setup: $(VENV)/.ready  ## install into .venv, with the versions that were tested last

$(VENV)/.ready: setup.py pyproject.toml requirements/tested.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -e '.[$(MM),dev]' \
	    $(if $(filter mm,$(MM)),-c requirements/tested.txt)
	touch $@

demo: setup  ## make data, train a detector, evaluate it, draw what it sees
	$(BIN)/python tools/make_demo_dataset.py --out data/digits
	$(BIN)/python tools/train.py $(DEMO)
	$(BIN)/python tools/test.py $(DEMO) $$(cat $(WORK)/last_checkpoint)
	$(BIN)/python tools/visualize.py $(DEMO) $$(cat $(WORK)/last_checkpoint)

demo-segmentation:  ## the same with a segmentor
	$(MAKE) demo TASK=segmentation

test: setup  ## run all tests, as CI does
	$(PYTEST)

test-fast: setup  ## run the tests of the daily loop
	$(PYTEST) -m 'not slow'

test-openmmlab:  ## run fast tests and a short training on the original MM packages
	$(MAKE) setup VENV=.venv-openmmlab MM=openmmlab
	.venv-openmmlab/bin/python -m pytest -m 'not slow'
	.venv-openmmlab/bin/python -m pytest tests/tools -k two_iterations

lint: setup  ## check style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: setup  ## mend style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

check: lint test  ## everything that CI runs

tested: setup  ## record the installed versions as the tested ones
	{ echo '# Versions that all tests last ran with; written by make tested.'; \
	  $(BIN)/python -m pip freeze --exclude-editable; } > requirements/tested.txt
