# make demo    set up everything and run unguided beside guided generation on the embedded models
# make test    set up everything, lint, run the tests; make test-all also those marked slow
# make wheel   build dist/entrgi-*.whl
# make gpu-pack   what a machine with a GPU and no network needs, see docs/kernels/README.md
# Everything happens in .venv and build/; only Python >= 3.10 with its headers, a C++ compiler and git are needed.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
CXX_SOURCES := $(shell find csrc tools -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')
BUILD_INPUTS := $(shell find csrc cmake -type f 2>/dev/null) CMakeLists.txt setup.py pyproject.toml
# What would slow a kernel down (register spills, serialised wgmma) fails here and warns everywhere else.
export ENTRGI_WERROR ?= 1
# Tools (cmake, ninja) come from the virtual environment.
export PATH := $(abspath $(BIN)):$(PATH)

.PHONY: FORCE env build demo test test-all lint format wheel wheel-test bench bench-check bench-simulated \
  ptxas-report docs gpu-pack gpu-day-dry-run clean

$(BIN)/.env: constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 10), "Python >= 3.10 is needed, found " + sys.version'
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -q -c constraints.txt torch setuptools cmake ninja pybind11
	$(PIP) install -q -c constraints.txt --no-deps nvidia-cutlass
	@touch $@
env: $(BIN)/.env

# Changes when ENTRGI_CUDA does.
$(BIN)/.cuda: $(BIN)/.env FORCE
	@echo '$(ENTRGI_CUDA)' | cmp -s - $@ || echo '$(ENTRGI_CUDA)' > $@
FORCE:

$(BIN)/.build: $(BIN)/.env $(BIN)/.cuda $(BUILD_INPUTS)
	$(PIP) install -v -c constraints.txt --no-build-isolation -e '.[test,lint,bench]' > $(VENV)/build.log 2>&1 \
	  || { tail -n 60 $(VENV)/build.log; exit 1; }
	@grep -E '^ *(-- )?entrgi: ' $(VENV)/build.log
	@touch $@
build: $(BIN)/.build

demo: build
	$(BIN)/entrgi sample --compare --seed 0 --prompt "The movie was" --prompt "I think"

# A process for each core, each with one thread; what they would all build is built before.
PYTEST_OPTIONS := -n logical --maxprocesses 8 --dist worksteal
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_OPTIONS)
test: build lint
	$(BIN)/python tests/support/build_simulated.py
	$(PYTEST)

test-all: build lint
	$(BIN)/python tests/support/build_simulated.py compute_80 compute_90a compute_90
	$(PYTEST) -m ''

lint: build
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/basedpyright --level error --pythonpath $(BIN)/python
	$(BIN)/clang-format --dry-run --Werror $(CXX_SOURCES)

format: build
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/clang-format -i $(CXX_SOURCES)

wheel: build
	rm -rf dist build/lib* build/bdist*
	$(PIP) wheel -q --no-build-isolation --no-deps -w dist .
	@ls -l dist/*.whl

# The wheel in a clean environment with another version of torch than the one that built it.
OTHER_TORCH ?= 2.13.0
WHEEL_VENV := build/wheel-venv
wheel-test: wheel
	rm -rf $(WHEEL_VENV)
	$(PYTHON) -m venv $(WHEEL_VENV)
	$(WHEEL_VENV)/bin/python -m pip --disable-pip-version-check install -q torch==$(OTHER_TORCH) dist/*.whl
	cd build && wheel-venv/bin/entrgi doctor
	cd build && wheel-venv/bin/entrgi sample --prompt "The movie was" --seed 0
	$(WHEEL_VENV)/bin/python -m pip --disable-pip-version-check install -q -c constraints.txt \
	  pytest pytest-timeout pytest-xdist hypothesis expecttest numpy scipy
	cd build && OMP_NUM_THREADS=1 wheel-venv/bin/python -P -m pytest $(PYTEST_OPTIONS) -m '' \
	  -c ../pyproject.toml --rootdir .. ../tests/ops

# On a machine with a GPU the operators are measured there; --resume goes on where an interrupted run stopped.
bench: build
	$(BIN)/python benchmarks/operators.py
	$(BIN)/python benchmarks/operators.py --readme
	$(BIN)/python benchmarks/end_to_end.py

# Registers, shared memory and telling instructions of every kernel; CHECK=--check compares with the committed report.
ptxas-report: build
	$(BIN)/python tools/ptxas_report.py $(CHECK)

# Measures few shapes again and fails where an operator has become slower, by ratios to what runs beside it.
bench-check: build
	$(BIN)/python benchmarks/bench_check.py

# Memory traffic of the CUDA kernels, counted in the simulator that the kernel tests use.
bench-simulated: build
	$(BIN)/python benchmarks/simulated.py

# The site of docs/ with the reference from the docstrings, into build/site.
docs: build
	$(PIP) install -q -c constraints.txt mkdocs-material 'mkdocstrings[python]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

# For the GPU day: the folder that is carried there, and the day itself with the simulator in place of the GPU.
gpu-pack: build
	$(BIN)/python tools/gpu_day.py pack

gpu-day-dry-run: build
	rm -rf build/gpu_dry_run
	$(BIN)/python tools/gpu_day.py run --dry-run --output build/gpu_dry_run
	$(BIN)/python benchmarks/gpu_report.py build/gpu_dry_run --output build/gpu_dry_run/report

clean:
	rm -rf build dist $(VENV) *.egg-info entrgi_ext/*.so
