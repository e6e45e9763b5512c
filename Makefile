# SPDX-License-Identifier: Apache-2.0
# Every target that needs the environment makes it first; `make` alone lists the targets.

venv := .venv
python := $(venv)/bin/python
stamp := $(venv)/.stamp

recipes := pyproject.toml setup.py tools/setup.sh
sources := $(shell find csrc -name '*.c' -o -name '*.h' -o -name '*.cpp' -o -name '*.cu')
c_files := $(sources) $(wildcard tests/core/*.c tests/core/*.h tests/core/*/*.c tests/core/*/*.h tests/core/*/*.cpp tests/core/threads/stub/torch/*.h tests/emulated/*.c tests/emulated/*/*.cpp tests/emulated/*/*.h tests/support/*/*.c)

# Further arguments of pytest: make test ARGS="-k pool -x"
ARGS ?=
# Processes that share the tests out, each with a pool of up to four ranks: a rank waits for its
# peers so often that one pool leaves a third of two cores idle, and two leave a sixth: three take
# 0.82 of the time of two there. make test JOBS=0 takes one.
JOBS ?= 3
# A file for pytest's exit status; make then ends well, and adds no words of its own.
STATUS ?=

.PHONY: help setup build demo test test-gpu cuda wheel lint format format-check types asan failing-allocations fuzz fuzz-keep random-plans tsan coverage coverage-python fuzz-python prove check bench bench-step bench-load bench-save bench-resume bench-experts bench-startup kill-saves kill-commands faults drift leaks sweep resume loops long docs docs-pages support page-test clean FORCE
.DEFAULT_GOAL := help

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(stamp) ## Make .venv with everything and build the package; nothing to do when up to date

# DeepSpeed compiles its shared-memory collectives at first use. A compiler that is killed leaves a
# lock behind on which all later starts wait, so the lock of this tree is in this tree.
export TORCH_EXTENSIONS_DIR ?= $(CURDIR)/build/torch_extensions

# A changed source needs the compilers only, a changed recipe the whole set-up.
$(stamp): $(recipes) $(sources)
	@tools/setup.sh $(if $(filter $(recipes),$?),all,build)
	@touch $@

build: $(stamp) ## Compile what changed; the same as setup once .venv is there

demo: $(stamp) ## Train a small Llama with TP 2 x DP 2 and compare with one process
	@$(python) examples/demo.py

# Where PYTHONDONTWRITEBYTECODE is set, each process of a test would compile all modules anew.
test: $(stamp) ## Run everything: format, lint, types, then all tests
	@$(MAKE) --no-print-directory format-check lint types
	@$(python) -m compileall -q deepspeed_autotp tests
	@$(python) -m pytest --numprocesses=$(JOBS) --dist=worksteal $(ARGS)$(if $(STATUS),; echo $$? > "$(STATUS)")

# The files that have tests for a GPU: others import what a GPU machine need not have.
gpu_tests := $(shell grep -rl 'mark\.gpu' tests --include='test_*.py')
# compute-sanitizer comes with the CUDA toolkit; where it is missing, that is said. torch's cache of
# memory is off, since within one of its large blocks nothing is out of bounds. Only our kernels are
# looked at, and not the calls of libraries, some of which fail by design. racecheck looks at
# shared memory alone: that copies follow each other in global memory is for the tests to show.
sanitizer := $(shell command -v compute-sanitizer)
kernels := $(shell grep -oh '[a-z_]*_kernel' csrc/cuda/*.cu | sort -u)
sanitized = PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --error-exitcode 9 \
	--target-processes all --report-api-errors no --launch-timeout 0 --tool $(1) \
	$(addprefix --kernel-name kns=,$(kernels)) \
	$(gpu_python) -m pytest -q -o timeout=0 tests/gpu/test_kernels.py \
	-k "not beyond_32_bits and not large_weight"

# A Python that has the package, torch and the test dependencies already. Nothing is built or
# fetched then, and the tests run in a folder without the sources, which would be found first.
INSTALLED ?=
gpu_python := $(or $(INSTALLED),$(abspath $(python)))
gpu_folder := $(if $(INSTALLED),build/installed,.)

test-gpu: export AUTOTP_REQUIRE_GPU := 1
test-gpu: $(if $(INSTALLED),build/installed,$(stamp)) ## On a GPU: its tests, also sanitized, and the benchmark. INSTALLED=
	@cd $(gpu_folder) && $(gpu_python) -m pytest -m gpu $(gpu_tests) $(ARGS)
	@cd $(gpu_folder) && $(gpu_python) -m benchmarks.gpu
ifeq ($(sanitizer),)
	@echo "compute-sanitizer is not there: memcheck and racecheck did not run"
else
	@cd $(gpu_folder) && $(call sanitized,memcheck)
	@cd $(gpu_folder) && $(call sanitized,racecheck)
endif

build/installed: FORCE
	@rm -rf $@ && mkdir -p $@ && cp -r tests benchmarks examples pyproject.toml $@

FORCE:

cuda: ## Compile the CUDA library for all architectures of a release, warnings as errors
	@AUTOTP_WERROR=1 AUTOTP_CUDA_ARCHS= $(python) setup.py -q build_cuda \
		--build-lib build/release --build-temp build/release

# Old objects of removed sources would go into the wheel, so its folder is made anew.
wheel: $(stamp) ## Build the wheel for all architectures into dist/, and use it from elsewhere
	@rm -rf dist build/lib* build/bdist*
	@AUTOTP_CUDA_ARCHS= $(python) -m pip wheel --quiet --no-build-isolation --no-deps -w dist .
	@tools/check_wheel.sh $(python) dist/*.whl

lint: $(stamp) ## Check the Python code with ruff
	@$(python) -m ruff check --quiet .

format: $(stamp) ## Format all C and Python code
	@$(venv)/bin/clang-format -i $(c_files)
	@$(python) -m ruff format .

format-check: $(stamp) ## Say what `make format` would change
	@$(venv)/bin/clang-format --dry-run --Werror $(c_files)
	@$(python) -m ruff format --diff --quiet .

types: $(stamp) ## Check the types, and the stub against the compiled core
	@$(python) -m mypy --no-error-summary
	@$(python) -m mypy.stubtest --concise deepspeed_autotp._core

asan: ## Run the C unit tests under AddressSanitizer and UBSan
	@$(MAKE) --no-print-directory -C tests/core asan

failing-allocations: ## Run them with each allocation of each call that they check failing in its turn
	@$(MAKE) --no-print-directory -C tests/core failing

# One of tests/core/fuzz/fuzz_*.c, or all in turn: make fuzz TARGET=regex MINUTES=30
TARGET ?=
target := $(if $(TARGET),TARGETS="$(TARGET)")

fuzz: ## Look for inputs on which the C code fails, with libFuzzer of clang. TARGET=, MINUTES=
	@$(MAKE) --no-print-directory -C tests/core fuzz $(target)

fuzz-keep: ## Keep what of these inputs reaches more code, in tests/core/fuzz/corpus. TARGET=
	@$(MAKE) --no-print-directory -C tests/core fuzz-keep $(target)

random-plans: ## Make random plans under the sanitizers; SEED=, ROUNDS=
	@$(MAKE) --no-print-directory -C tests/core random

tsan: ## Run the C code on several threads at once, under ThreadSanitizer
	@$(MAKE) --no-print-directory -C tests/core tsan

# gcovr is an extra of its own, put into .venv when it is first asked for.
gcovr := $(venv)/.coverage

$(gcovr): pyproject.toml | $(stamp)
	@$(python) -m tools.extra coverage | $(python) -m pip install --quiet -r /dev/stdin
	@touch $@

coverage: $(gcovr) ## Lines and branches of csrc/core that the C tests reach, also without memory; minutes
	@$(MAKE) --no-print-directory -C tests/core coverage
	@mkdir -p build/coverage
	@cd tests/core && ../../$(python) -m gcovr --root ../../csrc/core ../../build/core-coverage/core \
		--txt-metric branch --txt --html-details ../../build/coverage/index.html --print-summary

coverage-python: $(gcovr) ## Lines and branches of the package that the tests reach; half an hour. ARGS=
	@rm -rf build/coverage-python && mkdir -p build/coverage-python
	@$(python) -m coverage run -m pytest --numprocesses=$(JOBS) --dist=worksteal -o timeout=400 $(ARGS)
	@$(python) -m coverage combine -q
	@$(python) -m coverage report

# How long, and which files of tests instead of all.
MINUTES ?= 60
FUZZ ?=

fuzz-python: $(stamp) ## Give patterns, configurations and checkpoints of anybody's to the package. MINUTES=, FUZZ=
	@DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 $(python) -m tests.support.fuzzing --minutes $(MINUTES) $(FUZZ)

# The first seed, how many cases, the TP size instead of those that are drawn, and one case as it
# was printed: make prove SEED=1000 CASES=500 TP=3, make prove CASE="tp=3 tied=True"
SEED ?= 0
CASES ?= 100
CASE ?=
# Further options: make prove PROVE="--minutes 10 -v", and of which cases: PROVE="--only tp=3"
PROVE ?=

prove: $(stamp) ## Train random models sharded and in one process, and compare; minutes. SEED=, CASES=, TP=, CASE=
	@DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 $(python) -m tests.support.prove \
		$(if $(CASE),--case "$(CASE)",--seed $(SEED) --cases $(CASES)) \
		$(if $(filter command line,$(origin TP)),--tp $(TP)) $(PROVE)

check: format-check lint types asan ## What is green at every commit

bench: $(stamp) ## Run the benchmarks, one after the other
	@set -e; for name in plan self_check shard layers lookup; do $(python) -m benchmarks.$$name; done

# Further options of the step benchmark: make bench-step STEP="--sequence 512 --hidden 1024"
STEP ?=
# Without options it is the run that the README shows.
images := docs/images
chart := $(if $(STEP),,--chart $(images)/step.svg --json $(images)/step.json)

bench-step: $(stamp) ## Compare a sharded step with DeepSpeed's and transformers'; minutes. STEP=
	@$(python) -m benchmarks.step --tp $(TP) $(chart) $(STEP)

# Further options: make bench-load LOAD="--tp 2 --repeats 3"
LOAD ?=

bench-load: $(stamp) ## Load 1.1 billion parameters sharded, beside transformers and DeepSpeed; minutes. LOAD=
	@$(python) -m benchmarks.load $(LOAD)

kill-saves: $(stamp) ## End a save of two ranks at 20 moments, and load what is there
	@OMP_NUM_THREADS=1 $(python) -m tests.support.killed_saves 20

kill-commands: $(stamp) ## End autotp merge and reshard at 20 moments, and look at what is there; takes minutes
	@AUTOTP_LONG=1 AUTOTP_KILL_COMMANDS=1 $(python) -m pytest -q -s -o timeout=0 --numprocesses=0 \
		tests/integration/test_killed_commands.py::test_a_killed_command_leaves_all_or_nothing $(ARGS)

drift: $(stamp) ## Train 5,000 steps at TP 4 and compare ranks and loss curves; takes about an hour
	@AUTOTP_DRIFT=1 $(python) -m pytest -q -s -o timeout=0 --numprocesses=0 tests/distributed/test_drift.py $(ARGS)

leaks: $(stamp) ## Do everything thousands of times, and look at what is left; takes about an hour
	@AUTOTP_LEAKS=1 $(python) -m pytest -q -s -o timeout=0 --numprocesses=0 \
		tests/distributed/test_leaks.py tests/unit/test_core_references.py $(ARGS)

# Cells that begin with a word: make faults FAULTS="--only loop"
FAULTS ?=

faults: $(stamp) ## Give one rank a fault at each stage, and print what the others are told; takes minutes. FAULTS=
	@$(python) -m tests.support.faults $(FAULTS)

# Further options of the benchmark of saving: make bench-save SAVE="--tp 2 --layers 4"
SAVE ?=

bench-save: $(stamp) ## Save 1.1 billion parameters: gathered, in parallel, and DeepSpeed's way; minutes. SAVE=
	@$(python) -m benchmarks.save $(SAVE)

# Further options: make bench-resume RESUME="--hidden 2048"
RESUME ?=

bench-resume: $(stamp) ## Load at another TP size, merge and reshard 130 million parameters; minutes. RESUME=
	@$(python) -m benchmarks.resume $(RESUME)

# Further options: make bench-experts EXPERTS="--tp 2 --experts 64 --models gpt_oss"
EXPERTS ?=

bench-experts: $(stamp) ## A step of experts sharded in width, and as whole experts; minutes. EXPERTS=
	@$(python) -m benchmarks.experts $(EXPERTS)

# Further options: make bench-startup STARTUP="--ranks 2,4,8 --rounds 1"
STARTUP ?=

bench-startup: $(stamp) ## What sharding takes with the number of ranks: exchanges, bytes, seconds; minutes. STARTUP=
	@$(python) -m benchmarks.startup $(STARTUP)

# The TP size, and further options: make sweep TP=4 SWEEP="--only llama,gpt2"
TP ?= 2
SWEEP ?=

sweep: $(stamp) ## Train every transformers causal LM sharded; takes minutes. TP=, SWEEP=
	@$(python) -m benchmarks.sweep --tp $(TP) $(SWEEP)

resume: $(stamp) ## Resume at other TP and data-parallel sizes in all combinations; takes minutes
	@AUTOTP_LONG=1 AUTOTP_RESUME_MATRIX=1 $(python) -m pytest --numprocesses=$(JOBS) tests/integration/test_resume.py \
		tests/integration/test_distributed_checkpoint.py $(ARGS)

loops: $(stamp) ## Run Trainer, Accelerate and TRL loops and options in all combinations; takes minutes
	@AUTOTP_LONG=1 AUTOTP_LOOPS=1 $(python) -m pytest --numprocesses=$(JOBS) tests/integration/test_replicas.py \
		tests/integration/test_estimate.py tests/unit/test_estimate.py \
		tests/integration/test_trl.py tests/integration/test_trl_options.py \
		tests/integration/test_vllm.py tests/integration/test_options.py \
		tests/integration/test_quantized.py $(ARGS)

long: $(stamp) ## Run the tests that take too long for `make test`
	@AUTOTP_LONG=1 $(python) -m pytest -m long -o timeout=0 --numprocesses=$(JOBS) --dist=worksteal $(ARGS)

docs-pages: $(stamp) ## Write the pages of docs/ that are made of code and records
	@$(python) -m tools.docs_pages

support: $(stamp) ## Run the sweep at TP 2, 3 and 4, and write docs/support.md; minutes each. SWEEP=
	@mkdir -p build/sweep
	@for tp in 2 3 4; do $(python) -m benchmarks.sweep --tp $$tp --out build/sweep/tp$$tp.json $(SWEEP) || exit 1; done
	@$(python) -m tools.support_page $(foreach tp,2 3 4,$(tp)=build/sweep/tp$(tp).json)

# The generator is an extra of its own, put into .venv when it is first asked for.
generator := $(venv)/.docs

$(generator): pyproject.toml | $(stamp)
	@$(python) -m tools.extra docs | $(python) -m pip install --quiet -r /dev/stdin
	@touch $@

docs: $(generator) ## Make HTML of docs/ in build/docs, without a warning and without network
	@rm -rf build/docs
	@$(python) -m sphinx -q -W --keep-going -c docs -d build/doctrees -b html . build/docs
	@$(python) -m tools.check_pages build/docs
	@echo "build/docs/index.html"

page-test: $(stamp) ## Open the page of autotp plan --html in headless Chromium; installs playwright
	@command -v chromium >/dev/null || command -v chromium-browser >/dev/null || { echo "apt-get install chromium" >&2; exit 1; }
	@$(python) -m pip install --quiet --disable-pip-version-check 'playwright>=1.50'
	@$(python) -m pytest --numprocesses=0 tests/integration/test_plan_page.py $(ARGS)

clean: ## Remove what was built; .venv stays
	@rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis demo-output
	@rm -f deepspeed_autotp/*.so $(stamp)
	@find deepspeed_autotp tests examples benchmarks -name __pycache__ -prune -exec rm -rf {} +
