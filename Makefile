# Everything a developer or CI does with the sources, each in a virtual environment made here:
#
#   make demo | test | test-cuda-emulation | test-oldest | check | check-cuda | check-instructions | bench | bench-quick |
#        nightly | format | clean | help
#
# Variables: PYTHON (python3), VENV (.venv), TORCH (a torch version; unset: the one installed in VENV, else the newest),
# ARGS (passed on to the demo, the tests or the benchmarks), WORKERS (the processes that share the tests; 0: a single one without
# pytest-xdist), and the build's own: KL_EXT_CUDA, TORCH_CUDA_ARCH_LIST, MAX_JOBS.
PYTHON ?= python3
VENV ?= .venv
TORCH ?=
ARGS ?=
WORKERS ?= $(shell n=$$(nproc 2>/dev/null || echo 1); echo $$((n < 8 ? n : 8)))

# Without a GPU to run them on, no CUDA kernels are built here. A plain `pip install .` would build them for all architectures.
export KL_EXT_CUDA ?= auto

bin := $(VENV)/bin
# A stamp is a file that says which step is done, so that a step is repeated only when what it depends on has changed.
stamps := $(VENV)/stamps
torch := $(stamps)/torch-$(TORCH)
ifeq ($(TORCH),)
  torch := $(firstword $(wildcard $(stamps)/torch-*) $(stamps)/torch-newest)
endif
# The package is installed editable, so that a changed Python file needs nothing: what is compiled lies in the source folder,
# for the environment that installed it last.
package := build/installed-in-$(subst /,-,$(VENV))
sources := setup.py pyproject.toml CMakeLists.txt \
  $(shell find build_backend cmake csrc -type f -not -name '*.pyc' -not -path 'csrc/cuda/sass*')
cxx_files = $(shell find csrc tests benchmarks -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

oldest = $(shell sed -n 's/^MINIMUM = "\(.*\)"/\1/p' cmake/torch_info.py)

.PHONY: help demo test test-cuda-emulation test-oldest check check-cuda check-instructions bench bench-quick nightly format clean
.DELETE_ON_ERROR:

help:
	@echo 'make demo     train a small VAE on the digits of scikit-learn; ARGS="--epochs 5" and so on'
	@echo 'make test     the test-suite; ARGS="-k name" chooses tests, TORCH=2.13.0 a torch version'
	@echo 'make test-cuda-emulation  those tests that run the CUDA kernels without a GPU, then again under sanitizers'
	@echo 'make test-oldest  the test-suite with the oldest torch that is supported'
	@echo 'make check    clang-format, ruff and mypy'
	@echo 'make check-instructions  count the instructions of the CPU kernels and compare them with their ceilings'
	@echo 'make check-cuda  build the CUDA kernels, which needs nvcc and no GPU, and check their machine code'
	@echo 'make format   let clang-format and ruff rewrite the sources'
	@echo 'make bench    all benchmarks (a quarter of an hour), then the tables and plots of the pages'
	@echo '              on a GPU: benchmarks/README.md; ARGS="--device cuda" only writes benchmarks/results/cuda.json'
	@echo 'make bench-quick   a first impression of them (two minutes); ARGS="--only ratios" chooses suites'
	@echo 'make nightly  the tests that are too slow for make test; writes docs/nightly.md'
	@echo 'make clean    remove what was built, but not $(VENV), which holds torch'

demo: $(stamps)/demo
	$(bin)/python examples/train_vae.py $(ARGS)

test: $(stamps)/test
	$(bin)/python -m pytest -n $(WORKERS) $(ARGS)

# Sanitized, threads take turns in one order of the three, and tensors are cut at one limit. The sanitizers have to be there
# before Python allocates anything.
emulation := tests/cuda/test_cuda_emulation
test-cuda-emulation: $(stamps)/test
	$(bin)/python -m pytest -n $(WORKERS) $(emulation)*.py $(ARGS)
	LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so) $$(g++ -print-file-name=libstdc++.so)" \
	  KL_EXT_EMULATION_SANITIZE=1 ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	  $(bin)/python -m pytest -n $(WORKERS) $(emulation).py $(emulation)_sums.py $(emulation)_cuts.py -k 'random and not 4096' $(ARGS)

nightly: $(stamps)/test
	$(bin)/python tests/nightly.py $(ARGS)

bench: $(stamps)/bench
	$(bin)/python benchmarks/bench.py $(ARGS)
	$(bin)/python benchmarks/plots.py
	$(bin)/python benchmarks/table.py

bench-quick: $(stamps)/bench
	$(bin)/python benchmarks/bench.py --quick $(ARGS)

# Of the CPU kernels and calls, which a busy machine does not change; needs valgrind.
check-instructions: $(stamps)/test
	$(bin)/python benchmarks/instructions.py $(ARGS)

# The oldest torch that is supported, in an environment of its own; without CUDA kernels, since it is the API that differs.
test-oldest:
	$(MAKE) test VENV=.venv-oldest TORCH=$(oldest).0 KL_EXT_CUDA=0

check: $(stamps)/check
	$(bin)/clang-format --dry-run -Werror $(cxx_files)
	$(bin)/ruff check .
	$(bin)/ruff format --check .
	$(bin)/mypy

# ARGS="--write" for csrc/cuda/README.md too. What it takes besides nvcc and c++filt comes with a CUDA torch.
check-cuda: export KL_EXT_CUDA = all
check-cuda: $(package)
	$(bin)/python csrc/cuda/sass/check.py $(ARGS)

format: $(stamps)/check
	$(bin)/clang-format -i $(cxx_files)
	$(bin)/ruff check --fix .
	$(bin)/ruff format .

clean:
	rm -rf build dist *.egg-info kl_ext/_C.*.so kl_ext/lib kl_ext/share

$(stamps)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "kl_ext needs Python 3.10 or later; $(PYTHON) is $$($(PYTHON) --version 2>&1). Try PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || \
	  { echo "$(PYTHON) lacks the venv module; on Debian and Ubuntu: apt install python3-venv"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@mkdir -p $(stamps) && touch $@

$(torch): $(stamps)/python
	$(bin)/python -m pip install $(if $(TORCH),torch==$(TORCH),torch)
	@rm -f $(stamps)/torch-* && touch $@

$(package): $(torch) $(sources)
	$(bin)/python -m pip install -v -e .  # -v: the build shows how far it is
	$(bin)/python -m kl_ext
	@rm -f build/installed-in-* && touch $@

# The package is installed already: this adds what its extra names.
$(stamps)/demo $(stamps)/test $(stamps)/bench $(stamps)/check: $(package) pyproject.toml
	$(bin)/python -m pip install 'kl_ext[$(@F)]'
	@touch $@
