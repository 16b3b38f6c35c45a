# make quickstart | test | test-slow | soak | lint | docs | cuda-lock | bench-gpu | gpu-wheels | null-gpu. The first call makes .venv; later ones find it ready.
# PYTHON=... chooses the interpreter of .venv, ARGS=... is passed to the command, WORKERS=... sets the test processes.

PYTHON ?= $(shell for p in python3 python3.11 python3.12 python3.13; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
WORKERS ?= 2
# Python keeps what it compiled, whatever the environment says: tests start hundreds of interpreters.
PYTEST := OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

.PHONY: quickstart test test-slow soak lint docs cuda-lock bench-gpu gpu-wheels null-gpu

quickstart: .venv/.core
	CUDA_VISIBLE_DEVICES= $(BIN)/kha quickstart $(ARGS)

# Each promise of the README by its quickest test: minutes. docs/testing.md says which.
test: .venv/.dev
	$(PYTEST) -m '(quick or not slow) and not soak' $(ARGS)

# All other tests but those of `make soak`: half an hour.
test-slow: .venv/.dev
	$(PYTEST) -m 'slow and not quick and not soak' $(ARGS)

# The full grid of faults, a run of fifty random ones, and 3,000 random configurations: hours.
soak: .venv/.dev
	$(PYTEST) -m soak --timeout 7200 $(ARGS)

lint: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The documentation as a site, in build/site.
docs: .venv/.dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build -q $(ARGS)

# The exact versions of the image for CUDA machines (launch/image), by https://docs.astral.sh/uv; nothing is installed.
cuda-lock:
	uv pip compile pyproject.toml --extra export --extra data --extra remote --extra tensorboard --constraint constraints.txt --generate-hashes \
		--no-annotate --python-version 3.12 --python-platform x86_64-manylinux_2_28 --custom-compile-command "make cuda-lock" \
		-o launch/image/cuda.lock.txt -q

# Every GPU test and benchmark in under 9 minutes; results in bench-gpu/. Installs nothing, because there may be no network:
# GPU_PYTHON has torch for CUDA, the dependencies, pytest and (for the peer) transformers.
GPU_PYTHON ?= python3
bench-gpu:
	$(GPU_PYTHON) -c "from kha_train.cli.main import run; run()" bench gpu $(ARGS)

# The packages (53 MB) that a machine with only torch, triton, transformers, typer and pytest lacks, for GPU_VERSION of Python on x86-64:
# copy them there and name them in PYTHONPATH. Torch is never among them.
GPU_VERSION ?= 3.12
GPU_PIP = $(BIN)/python -m pip install --disable-pip-version-check --no-deps --upgrade --target gpu-wheels -c constraints.txt
gpu-wheels: .venv/.dev
	$(GPU_PIP) --no-build-isolation deepspeed hydra-core omegaconf antlr4-python3-runtime hjson einops py-cpuinfo \
		sortedcontainers pytest-timeout
	$(GPU_PIP) --only-binary=:all: --python-version $(GPU_VERSION) --platform manylinux_2_28_x86_64 \
		--platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 \
		hypothesis sentencepiece psutil msgpack pydantic pydantic-core annotated-types typing-inspection

# A torch of the pinned version that PYTHON has already, such as one for the GPU of this machine, is used and not
# downloaded again.
TORCH := $(shell sed -n 's/^torch==//p' constraints.txt)
SHARE = $(shell $(PYTHON) -c 'from importlib.metadata import version; \
	print("--system-site-packages" * (version("torch").partition("+")[0] == "$(TORCH)"))' 2>/dev/null)
DOWNLOADS = Installing into .venv takes minutes, the first time only. $(if $(SHARE),It uses the torch $(TORCH) of \
	$(PYTHON).,It downloads torch $(TORCH), which on Linux brings some 3 GB of CUDA libraries unless pip finds the build \
	for CPUs: PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu)

# The CUDA path without a GPU: hundreds of small runs on a device whose kernels do nothing (docs/testing.md). Needs gcc, and an
# environment of its own with torch for CUDA, which takes 3 GB; NULL_GPU_PYTHON names one that is there.
NULL_GPU_PYTHON ?= .null-gpu/bin/python
null-gpu: $(NULL_GPU_PYTHON)
	$(NULL_GPU_PYTHON) tools/null_gpu/matrix.py $(ARGS)

.null-gpu/bin/python:
	$(PYTHON) -m venv .null-gpu
	grep -vE '^(torch|triton)\b' constraints.txt >.null-gpu/constraints.txt
	$@ -m pip install --disable-pip-version-check -c .null-gpu/constraints.txt torch==2.11.0 triton==3.6.0 -e '.[data]' \
		|| { rm -rf .null-gpu; exit 1; }

# A stamp is newer than the files it was installed from.
.venv/.core: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11"; exit 1; }
	@echo "$(DOWNLOADS)"
	$(PYTHON) -m venv $(SHARE) .venv
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e .
	@touch $@

.venv/.dev: .venv/.core
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@
