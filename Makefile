# The commands a person types. Everything is installed into .venv; PYTHON chooses the interpreter that makes it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
export OMP_WAIT_POLICY := PASSIVE
export GOMP_SPINCOUNT := 100000
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: demo demo-long methods test test-gpu lint bench setup clean

demo: setup
	$(BIN)/fuseer demo

demo-long: setup
	$(BIN)/fuseer demo recipe=tiny_swav_long

# one after the other, each a folder of its own in runs/, which must not exist yet; then the table in README.md
METHODS := tiny_swav tiny_simclr tiny_moco_v2 tiny_moco_v3
methods: setup
	for recipe in $(METHODS); do \
		$(BIN)/fuseer demo recipe=$$recipe out=runs/methods/$$recipe && $(BIN)/fuseer eval linear run=runs/methods/$$recipe || exit; \
	done
	$(BIN)/python -m benchmarks.report $(METHODS:%=methods=runs/methods/%)

# two files of tests at a time: most of them use one core
test: setup
	$(BIN)/ruff check .
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile

lint: setup
	$(BIN)/ruff check .

# DEVICE=cuda measures the GPU
DEVICE ?= cpu
bench: $(VENV)/.bench
	$(BIN)/fuseer bench device=$(DEVICE)
	$(BIN)/fuseer bench sweep device=$(DEVICE)
	$(BIN)/fuseer bench step device=$(DEVICE)
	$(BIN)/fuseer bench report

# on a machine with a GPU every case of every op runs there too
test-gpu: setup
	@$(BIN)/python -c "import sys, torch; sys.exit(0 if torch.cuda.is_available() else 'make test-gpu: torch finds no CUDA device')"
	$(BIN)/python -m pytest tests/kernels

setup: $(STAMP)

# torch comes first, on its own: the extension is built against it, and pip's isolated build would fetch a second one.
$(STAMP): pyproject.toml setup.py $(wildcard csrc/*.cpp csrc/*.h csrc/*/*.cpp csrc/*/*.h csrc/*.cuh csrc/*/*.cu)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip "setuptools>=77" wheel ninja
	$(BIN)/pip install --quiet "torch>=2.9" torchvision
	$(BIN)/pip install --quiet --no-build-isolation --editable ".[engine,dali-cu13,dev]"
	@$(BIN)/python -c "from fuseer.kernels import extension; print(extension.reason() or 'fuseer.kernels._C is built')"
	touch $(STAMP)

# what the benchmarks compare with
$(VENV)/.bench: $(STAMP)
	$(BIN)/pip install --quiet --no-build-isolation --editable ".[bench]"
	touch $(VENV)/.bench

clean:
	rm -rf build *.egg-info kernels/_C*.so
