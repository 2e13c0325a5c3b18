# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.DELETE_ON_ERROR:
.PHONY: demo test lint bench gpu programs clean

demo: $(VENV)/demo.stamp
	$(BIN)/gradwatch demo $(ARGS)

# TensorFlow and torch in one process are two runtimes on the same cores: its tests are a run of their own.
# Tests wait for processes more than they compute: one worker a core, each with one thread, takes two thirds of the time.
test: $(VENV)/dev.stamp programs lint
ifdef ARGS
	$(BIN)/python -m pytest -m "not gpu" $(ARGS)
else
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not gpu and not alone" --numprocesses auto --maxprocesses 4 --dist worksteal
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m alone
	$(BIN)/python -m pytest -m "not gpu" tests/tensorflow
endif

lint: $(VENV)/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/dev.stamp
	$(BIN)/python benchmarks/hook_overhead.py

# What needs a CUDA device; without one each test says so and is skipped.
gpu: $(VENV)/dev.stamp
	$(BIN)/python -m pytest -m gpu $(ARGS)
	$(BIN)/python benchmarks/hook_overhead.py --device cuda

# A machine with an NVIDIA GPU: TORCH_INDEX names the index of the CUDA build that you want.
PIP_OPTIONS = --constraint constraints.txt $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))

$(VENV)/demo.stamp: $(VENV)/made.stamp pyproject.toml constraints.txt
	@scripts/install "gradwatch with PyTorch, scikit-learn and Bokeh" $(BIN)/python $(PIP_OPTIONS) --editable ".[torch,demo,page]"
	touch $@

$(VENV)/dev.stamp: $(VENV)/made.stamp pyproject.toml constraints.txt
	@scripts/install "gradwatch with PyTorch, TensorFlow and what tests need" $(BIN)/python $(PIP_OPTIONS) --editable ".[dev]"
	touch $@ $(VENV)/demo.stamp

$(VENV)/made.stamp:
	@scripts/venv "$(PYTHON)" "$(VENV)"
	touch $@

programs:
	@scripts/programs

clean:
	rm -rf $(VENV) build .pytest_cache .mypy_cache .ruff_cache
