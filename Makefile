# `make demo` and `make test` work in a fresh clone; both set up .venv first.
# One torch for development, so that results compare; the package itself accepts torch >= 2.10.
TORCH ?= torch==2.13.0
PYTHON ?= python3
VENV ?= .venv

# Tests run in this many processes.
JOBS ?= $(shell n=$$(nproc); echo $$((n < 8 ? n : 8)))

BIN := $(VENV)/bin
PYTEST := $(BIN)/python -m pytest -n $(JOBS) --dist worksteal
TOOLS := $(VENV)/.tools-$(subst =,-,$(TORCH))
READY := $(VENV)/.ready

# pip shows a bar for what it downloads, but in a log it fills pages.
QUIET := $(if $(MAKE_TERMOUT),,--quiet)

.DEFAULT_GOAL := help

.PHONY: help
help:  ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*##/\t/' | expand -t 14

# Python compiles a module when it is first imported; most of what is installed never is.
$(TOOLS): Makefile pyproject.toml tools/requirements.py
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python tools/requirements.py dev > $(VENV)/requirements.txt
	@echo "Installing $(TORCH) and the tools of development into $(VENV): a few minutes."
	$(BIN)/pip install $(QUIET) --no-compile '$(TORCH)' -r $(VENV)/requirements.txt
	touch $@

.PHONY: tools
tools: $(TOOLS)  ## set up .venv with all that development needs, without the native library

# Rebuilds what changed: seconds after an edit of one kernel. pip hides what a build prints, so it
# gets the library built.
$(READY): $(TOOLS) pyproject.toml setup.py CMakeLists.txt tools/backend.py $(shell find csrc -type f)
	@echo "Compiling what has changed; all of it takes about three minutes on two cores."
	$(BIN)/python setup.py --quiet build_ext --inplace
	$(BIN)/pip install --quiet --no-build-isolation --no-deps -e .
	touch $@

.PHONY: build
build: $(READY)  ## set up .venv and build the native library

.PHONY: demo
demo: $(READY)  ## train with and without the AND-mask; writes figures into runs/
	$(BIN)/python -m studies spirals --quick

# CoinRun's package wants an old numpy: the game has a Python 3.11 of its own.
GAME := $(VENV)/game
GAME_PYTHON ?= python3.11

$(GAME)/.ready:
	$(GAME_PYTHON) -m venv $(GAME)
	$(GAME)/bin/pip install --quiet --no-compile 'procgen2==0.10.7' 'numpy<2'
	touch $@

.PHONY: game
game: $(GAME)/.ready  ## the Python in which CoinRun is played: ANDMASK_GAME_PYTHON=.venv/game/bin/python

# The build on PyPI is for CUDA and breaks packages that look for it beside a torch without: it has
# a folder of its own.
TORCHVISION := $(VENV)/torchvision

$(TORCHVISION)/.ready: $(TOOLS)
	$(BIN)/pip install --quiet --no-compile --no-deps --target $(TORCHVISION) 'torchvision==0.28.*'
	touch $@

.PHONY: torchvision
torchvision: $(TORCHVISION)/.ready  ## for the test that reads CIFAR-10: ANDMASK_TORCHVISION=.venv/torchvision

# What docs/results.md holds. Interrupted, it goes on where it was.
define RESULTS
studies spirals --part search
studies spirals --part environments --seeds 0
studies spirals --revolutions 1 2 3 --seeds 0
studies spirals --setting released --seeds 1 2 3
studies spirals --setting tuned --seeds 1 2 3
studies correlation
studies linear
studies landscape
studies label-noise
studies threshold
studies coinrun
benchmarks.contest
endef
export RESULTS

.PHONY: results
results: $(READY) game  ## every study in full, two to four hours; and one page of all: runs/report.html
	echo "$$RESULTS" | while read -r study; do \
	  ANDMASK_GAME_PYTHON=$(GAME)/bin/python $(BIN)/python -m $$study </dev/null || exit; \
	done
	$(BIN)/python -m studies report

# In tiers: `test` is the library's suite, `test-rest` all else: studies, and what
# compiles or installs the package. CI runs both. TESTS=tests/optim chooses a part.
TESTS ?= tests
LIBRARY := --ignore=tests/studies --ignore=tests/benchmarks -m 'not (large or build or zoo)'

.PHONY: test
test: $(READY)  ## the library's test suite
	$(PYTEST) $(LIBRARY) $(TESTS)

.PHONY: test-quick
test-quick: $(READY)  ## the same with few examples per property: between two edits
	ANDMASK_HYPOTHESIS_PROFILE=quick $(PYTEST) $(LIBRARY) $(TESTS)

# An installed wheel has no harness for tests/native.
.PHONY: test-here
test-here:  ## the same but for kernels, with the python3 and the library that you have
	@$(PYTHON) -c 'import hypothesis, xdist' 2>/dev/null || \
	  { echo "test-here: run: pip install --no-build-isolation '.[test]'" >&2; exit 1; }
	$(PYTHON) -m pytest -n $(JOBS) --dist worksteal --ignore=tests/native $(LIBRARY) $(TESTS)

.PHONY: test-rest
test-rest: $(READY) game torchvision  ## the tests of studies, of CoinRun, of builds
	ANDMASK_GAME_PYTHON=$(abspath $(GAME))/bin/python ANDMASK_TORCHVISION=$(abspath $(TORCHVISION)) \
	  $(PYTEST) -m 'study or build' $(TESTS)

.PHONY: test-all
test-all: test test-rest  ## every test but test-large

.PHONY: test-zoo
test-zoo: $(READY)  ## torch's databases of modules and ops, compared with the loop
	$(PYTEST) tests/zoo --ignore=tests/zoo/test_models.py --ignore=tests/zoo/test_setups.py

.PHONY: test-models
test-models: $(READY)  ## models of transformers and peft, tiny, also in training loops of others
	$(PYTEST) tests/zoo/test_models.py tests/zoo/test_setups.py

# Each seed is a network; `make fuzz-agreement FIRST=5000` goes on where 5,000 seeds ended.
FIRST ?= 0
COUNT ?= 5000

.PHONY: fuzz-agreement
fuzz-agreement: $(READY)  ## random networks that move rows about, compared with the loop; COUNT=5000
	$(BIN)/python -m tests.agreement.fuzz --first $(FIRST) --count $(COUNT)

.PHONY: test-long
test-long: $(READY)  ## the suite with 5,000 drawn examples per property (an hour)
	ANDMASK_HYPOTHESIS_PROFILE=long $(PYTEST) -m 'not (large or zoo)' $(TESTS)

.PHONY: test-processors
test-processors: $(READY)  ## what computes, with the instructions of other processors (needs cc)
	PYTHON=$(BIN)/python tools/check_processors.sh -n $(JOBS) --dist worksteal $(LIBRARY) \
	  $(patsubst %,--ignore=tests/%,benchmarks plots repo zoo) $(TESTS)

.PHONY: test-large
test-large: $(READY)  ## the test with more than 2^31 elements (needs 12 GiB)
	$(BIN)/python -m pytest -m large

# Through the CUDA ops, whose kernels then run thread by thread on the host (a quarter of an hour).
CUDA_TESTS ?= tests/ops tests/rules tests/optim tests/nn tests/agreement tests/test_*.py

.PHONY: test-cuda-on-host
test-cuda-on-host: $(READY)  ## the tests of ops and training on the CUDA kernels, without a GPU
	ANDMASK_TEST_KERNELS=cuda-on-host $(PYTEST) $(CUDA_TESTS)

CUDA_CHECK ?=

.PHONY: cuda-check
cuda-check: $(READY)  ## compile for sm_80, 90, 100: registers, spills, wide loads (needs nvcc)
	$(BIN)/python tools/requirements.py cuda-check > $(VENV)/cuda-check.txt
	$(BIN)/pip install --quiet --no-compile -r $(VENV)/cuda-check.txt
	$(BIN)/python tools/cuda_check.py $(CUDA_CHECK)

.PHONY: cuda-sanitize
cuda-sanitize: $(READY)  ## memcheck, racecheck and synccheck of the op tests (needs a GPU)
	PYTHON=$(BIN)/python tools/cuda_sanitize.sh

.PHONY: bench
bench: $(READY)  ## measure; see benchmarks/README.md for options
	$(BIN)/python -m benchmarks.bench_masked_mean
	$(BIN)/python -m benchmarks.bench_rules
	$(BIN)/python -m benchmarks.bench_moments
	$(BIN)/python -m benchmarks.bench_backward
	$(BIN)/python -m benchmarks.bench_optim
	$(BIN)/python -m benchmarks.bench_thresholds
	$(BIN)/python -m benchmarks.bench_outer
	$(BIN)/python -m benchmarks.bench_proved
	$(BIN)/python -m benchmarks.bench_agreement
	$(BIN)/python -m benchmarks.bench_trainers
	$(BIN)/python -m benchmarks.bench_metrics
	$(BIN)/python -m benchmarks.bench_cuda

.PHONY: lint
lint: $(TOOLS)  ## ruff, mypy --strict, clang-format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $$(find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu')

.PHONY: format
format: $(TOOLS)  ## reformat Python and C++
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu')

# The kernels under AddressSanitizer and UndefinedBehaviorSanitizer, driven by the harness tests.
.PHONY: sanitize
sanitize: $(READY)  ## the kernel tests under ASan and UBSan
	$(BIN)/cmake -S . -B build/sanitize -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja \
	  -DANDMASK_SANITIZE=ON -DANDMASK_HARNESS=ON -DPython_EXECUTABLE=$(abspath $(BIN))/python \
	  -Dpybind11_DIR=$$($(BIN)/python -m pybind11 --cmakedir) \
	  -DANDMASK_TORCH_DIR=$$($(BIN)/python -c 'import torch; print(torch.__path__[0])')
	$(BIN)/cmake --build build/sanitize --target _harness
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
	  ASAN_OPTIONS=detect_leaks=0 ANDMASK_HARNESS_DIR=build/sanitize \
	  $(PYTEST) tests/native/test_*_kernels.py tests/native/test_elementary.py \
	  tests/native/test_cuda_*.py

.PHONY: clean
clean:  ## remove builds (not .venv, not runs)
	rm -rf build dist *.egg-info andmask_ext/lib andmask_ext/*.so
