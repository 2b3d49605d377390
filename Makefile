# The commands a person types. Everything is installed into .venv; PYTHON chooses the interpreter that makes it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
export OMP_WAIT_POLICY := PASSIVE
export GOMP_SPINCOUNT := 100000
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: demo demo-long test lint bench setup clean

demo: setup
	$(BIN)/fuseer demo

demo-long: setup
	$(BIN)/fuseer demo recipe=tiny_swav_long

test: setup
	$(BIN)/ruff check .
	$(BIN)/python -m pytest

lint: setup
	$(BIN)/ruff check .

bench: setup
	$(BIN)/python benchmarks/kernels/sinkhorn.py --compile
	$(BIN)/python benchmarks/kernels/swapped_prediction.py
	$(BIN)/python benchmarks/report.py

setup: $(STAMP)

# torch comes first, on its own: the extension is built against it, and pip's isolated build would fetch a second one.
$(STAMP): pyproject.toml setup.py $(wildcard csrc/*.cpp csrc/*.h csrc/*/*.cpp csrc/*/*.h csrc/*/*.cu)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip "setuptools>=77" wheel ninja
	$(BIN)/pip install --quiet "torch>=2.9" torchvision
	$(BIN)/pip install --quiet --no-build-isolation --editable ".[engine,dali-cu13,dev]"
	@$(BIN)/python -c "from fuseer.kernels import extension; print(extension.reason() or 'fuseer.kernels._C is built')"
	touch $(STAMP)

clean:
	rm -rf build *.egg-info kernels/_C*.so
