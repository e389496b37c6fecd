# Two commands do everything: `make demo` and `make test`. Both set up .venv on their first run.
PYTHON ?= python3
VENV ?= .venv
MM ?= mm
BIN := $(VENV)/bin
# Tests run in two processes of a thread each: most of their time is Python's, which has one.
WORKERS ?= 2
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

DEMO ?= configs/detection/demo/faster-rcnn_rdnet-nano_fpn_8e_digits.py
WORK = work_dirs/$(basename $(notdir $(DEMO)))

# The tested versions hold for the distribution and the Python that they were tested with.
PY_VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
TESTED := $(shell sed -n 's/^\# Python //p' requirements/tested.txt)
ifeq ($(MM)-$(PY_VERSION),mm-$(TESTED))
CONSTRAINTS := -c requirements/tested.txt
else
$(info $(MM) on Python $(PY_VERSION) (tested: mm on $(TESTED)): pip chooses the versions)
endif

# Versions of torch in place of the tested ones.
TORCH ?=
OLDEST := torch==2.4.* torchvision==0.19.*

# Threads that wait for one another sleep rather than spin: kinder to a small, shared machine
# (docs/decisions.md, 10).
export OMP_WAIT_POLICY ?= passive

.PHONY: help setup demo demo-segmentation test test-fast test-oldest test-newest test-openmmlab
.PHONY: benchmark lint format check tested

help:  ## show this list
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:[^#]*## /: /' | column -t -s ':'

setup: $(VENV)/.ready  ## install into .venv, with the versions that were tested last

$(VENV)/.ready: setup.py pyproject.toml requirements/tested.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -e '.[$(MM),dev]' $(TORCH) $(CONSTRAINTS)
	touch $@

demo: setup  ## make data, train DEMO (a config), evaluate it, draw what it sees
	$(BIN)/python tools/make_demo_dataset.py --out data/digits
	$(BIN)/python tools/train.py $(DEMO)
	$(BIN)/python tools/test.py $(DEMO) $$(cat $(WORK)/last_checkpoint)
	$(BIN)/python tools/visualize.py $(DEMO) $$(cat $(WORK)/last_checkpoint)

demo-segmentation:  ## the same with a segmentor
	$(MAKE) demo DEMO=configs/segmentation/demo/upernet_rdnet-nano_400i_digits-192x192.py

test: setup  ## run all tests, as CI does
	$(PYTEST)

test-fast: setup  ## run the tests of the daily loop
	$(PYTEST) -m 'not slow'

test-oldest:  ## run all tests on the oldest torch that is supported
	$(MAKE) test VENV=.venv-oldest TORCH='$(OLDEST)' CONSTRAINTS=

test-newest:  ## run all tests on the newest versions that pip finds
	rm -rf .venv-newest
	$(MAKE) test VENV=.venv-newest CONSTRAINTS=

test-openmmlab:  ## run all tests on the original MM packages
	$(MAKE) test VENV=.venv-openmmlab MM=openmmlab

RECORD ?= dev/benchmark/results/cpu.json
COMPARE = $(BIN)/python -m dev.benchmark compare --json $(RECORD)
TRAIN = $(COMPARE) --mode train --batch 2 --no-compile

benchmark: setup  ## time backbones beside others', for docs/performance.md (20 minutes)
	rm -f $(RECORD)
	$(COMPARE) --names condensenetv2_a condensenetv2_b condensenetv2_c --no-compile --rounds 20
	$(COMPARE) --names rexnet_100 --dtype float32 bfloat16 --rounds 15
	$(COMPARE) --names densenet121 rdnet_tiny --against timm --dtype float32 bfloat16 --rounds 12 --no-memory
	$(TRAIN) --names densenet121 --against torchvision torchvision_memory_efficient --rounds 5
	$(TRAIN) --names rdnet_tiny --dtype bfloat16 --rounds 5
	$(BIN)/python -m dev.benchmark report

lint: setup  ## check style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: setup  ## mend style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

check: lint test  ## everything that CI runs

tested: setup  ## record the installed versions as the tested ones
	{ echo '# Versions that all tests last ran with; written by make tested.'; \
	  echo '# Python $(PY_VERSION)'; \
	  $(BIN)/python -m pip freeze --exclude-editable; } > requirements/tested.txt
