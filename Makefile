# The verbs of the project. Each makes the environment it needs in .venv, under constraints.txt.
# Every line is a command one could type.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
export PATH := $(CURDIR)/$(BIN):$(PATH)
# Spinning OpenMP threads slow training tenfold on a machine that does something else as well.
export OMP_WAIT_POLICY ?= PASSIVE
# make test leaves these to their own commands (see CONTRIBUTING).
SKIP := not slow and not network and not packaging

.PHONY: demo test test-slow test-sanitize compiled bench lint types build wheel clean

# The CUDA library, minutes of compiling, is of no use to the demo where there is no GPU.
ifeq (,$(shell command -v nvidia-smi))
demo: export KDKERNELS_CUDA ?= off
endif
demo: build
	$(BIN)/kdkernels distill $(ARGS)

test: build
	$(BIN)/python -m pytest -n auto --dist worksteal -m "$(SKIP)" $(ARGS)

test-slow: build
	$(BIN)/python -m pytest -m "slow or network" $(ARGS)

test-sanitize: build
	$(BIN)/python tests/sanitize.py $(ARGS)

compiled: build
	$(BIN)/python bench/compiled.py $(ARGS)

bench: build
	$(BIN)/python -m pytest bench/test_bench.py $(ARGS)

lint: $(VENV)/tools
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	git ls-files '*.cpp' '*.h' '*.cu' '*.cuh' | xargs $(BIN)/clang-format --dry-run --Werror

# mypy cannot follow the default editable finder; a strict editable install is a tree of links. It
# needs the packages whose types ours build on: without them it finds other mistakes than with them.
types: $(VENV)/tools $(VENV)/installed
	rm -rf build/types && mkdir -p build/types
	KDKERNELS_NATIVE=off $(PIP) install -q --no-build-isolation --no-deps --target build/types .
	cd build/types && MYPYPATH=. ../../$(BIN)/mypy --config-file ../../pyproject.toml -p kdkernels

build: $(VENV)/installed
	$(BIN)/python setup.py -q build_ext --inplace

wheel: $(VENV)/tools
	$(BIN)/python -m build --no-isolation --outdir dist

clean:
	rm -rf build dist *.egg-info kdkernels/*.so .pytest_cache .mypy_cache .ruff_cache .benchmarks

$(VENV)/python:
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -q -c constraints.txt torch==2.13.0 numpy
	$(PIP) install -q -c constraints.txt setuptools wheel cmake ninja pybind11
	touch $@

$(VENV)/tools: $(VENV)/python pyproject.toml constraints.txt
	$(PIP) install -q -c constraints.txt build clang-format mypy pre-commit ruff typer rich types-PyYAML
	touch $@

# The package itself, editable; its native libraries are built by the build verb, incrementally.
$(VENV)/installed: $(VENV)/python pyproject.toml constraints.txt setup.py
	KDKERNELS_NATIVE=off $(PIP) install -q -c constraints.txt --no-build-isolation -e ".[triton,cache,distill,study,test]"
	# One file of it is compared with; what it asks for itself, data sets and plots, is not needed.
	$(PIP) install -q --no-deps pyvene==0.1.8
	touch $@
