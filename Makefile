# Start with `make demo` and `make test`. Both set up .venv on their first run.
PYTHON ?= python3
VENV ?= .venv
MM ?= mm
BIN := $(VENV)/bin
# Two test processes with one thread each: most of the time is spent in Python itself.
WORKERS ?= 2
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

DEMO ?= configs/detection/demo/faster-rcnn_rdnet-nano_fpn_8e_digits.py
WORK = work_dirs/$(basename $(notdir $(DEMO)))

# The tested versions apply to the distribution and the Python that they were tested with.
PY_VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
TESTED := $(shell sed -n 's/^\# Python //p' requirements/tested.txt)
ifeq ($(MM)-$(PY_VERSION),mm-$(TESTED))
CONSTRAINTS := -c requirements/tested.txt
else
$(info $(MM) on Python $(PY_VERSION) (tested: mm on $(TESTED)): pip chooses the versions)
endif

# mmpretrain comes in two distributions too.
CLASSIFICATION := classification$(if $(filter openmmlab,$(MM)),-openmmlab)

# Overrides the tested versions of torch, such as 'torch==2.4.* torchvision==0.19.*'.
TORCH ?=
OLDEST := torch==2.4.* torchvision==0.19.*

# Waiting threads sleep instead of spinning: faster on a small, shared machine (docs/decisions.md).
export OMP_WAIT_POLICY ?= passive

.PHONY: help setup demo demo-segmentation test test-slow test-all test-oldest test-newest
.PHONY: test-openmmlab size benchmark lint format check tested

help:  ## show this list
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:[^#]*## /: /' | column -t -s ':'

setup: $(VENV)/.ready  ## install into .venv, with the last tested versions

$(VENV)/.ready: setup.py pyproject.toml requirements/tested.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -e '.[$(MM),$(CLASSIFICATION),dev]' $(TORCH) $(CONSTRAINTS)
	touch $@

demo: setup  ## make data, train DEMO (a config), test it and save its predictions as images
	$(BIN)/python tools/make_demo_dataset.py --out data/digits
	$(BIN)/python tools/train.py $(DEMO)
	$(BIN)/python tools/test.py $(DEMO) $$(cat $(WORK)/last_checkpoint)
	$(BIN)/python tools/visualize.py $(DEMO) $$(cat $(WORK)/last_checkpoint)

demo-segmentation:  ## run the demo with a segmentor
	$(MAKE) demo DEMO=configs/segmentation/demo/upernet_rdnet-nano_400i_digits-192x192.py

test: setup  ## run the tests, except the slow ones
	$(PYTEST) -m 'not slow'

test-slow: setup  ## run the slow tests: trainings, compilation, other processes
	$(PYTEST) -m slow

test-all: setup  ## run all tests
	$(PYTEST)

test-oldest:  ## run all tests on the oldest supported torch
	$(MAKE) test-all VENV=.venv-oldest TORCH='$(OLDEST)' CONSTRAINTS=

test-newest:  ## run all tests on the newest versions that pip finds
	rm -rf .venv-newest
	$(MAKE) test-all VENV=.venv-newest CONSTRAINTS=

test-openmmlab:  ## run all tests on the original MM packages
	$(MAKE) test-all VENV=.venv-openmmlab MM=openmmlab

size:  ## count the lines of the package, the code around it, and the tests
	@for folder in mmdense tools dev tests; do \
	  printf '%-8s %6d lines of Python\n' $$folder $$(git ls-files $$folder | grep '\.py$$' | xargs cat | wc -l); \
	done

RECORD ?= dev/benchmark/results/cpu.json
COMPARE = $(BIN)/python -m dev.benchmark compare --json $(RECORD)
TRAIN = $(COMPARE) --mode train --batch 2

benchmark: setup  ## compare backbones and detectors with others', for docs/performance.md (an hour)
	rm -f $(RECORD)
	$(COMPARE) --names condensenetv2_a condensenetv2_b condensenetv2_c --no-compile --rounds 20
	$(COMPARE) --names rexnet_100 --dtype float32 bfloat16 --rounds 15
	$(COMPARE) --names densenet121 rdnet_tiny --against timm --dtype float32 bfloat16 --rounds 12 --no-memory
	$(TRAIN) --names densenet121 rdnet_tiny rexnet_100 --size 320 320 --forms plain lean --against timm --rounds 10 --no-memory
	$(TRAIN) --names densenet121 --no-compile --against torchvision torchvision_memory_efficient --rounds 5
	$(TRAIN) --names rdnet_tiny --no-compile --dtype bfloat16 --rounds 5
	$(BIN)/python -m dev.benchmark detectors --json $(RECORD) --no-compile
	$(BIN)/python -m dev.docs

lint: setup  ## check style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: setup  ## fix style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

check: lint test test-slow  ## run everything that CI runs

tested: setup  ## record the installed versions as the tested ones
	{ echo '# Versions that all tests last ran with, written by make tested.'; \
	  echo '# Python $(PY_VERSION)'; \
	  $(BIN)/python -m pip freeze --exclude-editable; } > requirements/tested.txt
