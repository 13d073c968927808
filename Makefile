# Everything a developer or CI does with the sources, each in a virtual environment made here:
#
#   make demo | test | check | bench | bench-quick | nightly | format | clean | help
#
# Variables: PYTHON (python3), VENV (.venv), TORCH (a torch version; unset: the one installed in VENV, else the newest),
# ARGS (passed on to the demo, the tests or the benchmarks), and the build's own: KL_EXT_CUDA, TORCH_CUDA_ARCH_LIST, MAX_JOBS.
PYTHON ?= python3
VENV ?= .venv
TORCH ?=
ARGS ?=

# Where there is no nvcc, a CUDA torch gets CPU kernels here; a plain `pip install .` would stop and say so.
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
sources := setup.py pyproject.toml CMakeLists.txt $(shell find build_backend cmake csrc -type f -not -name '*.pyc')
cxx_files = $(shell find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

.PHONY: help demo test check bench bench-quick nightly format clean
.DELETE_ON_ERROR:

help:
	@echo 'make demo     train a small VAE on the digits of scikit-learn; ARGS="--epochs 5" and so on'
	@echo 'make test     the test-suite; ARGS="-k name" chooses tests, TORCH=2.13.0 a torch version'
	@echo 'make check    clang-format, ruff and mypy'
	@echo 'make format   let clang-format and ruff rewrite the sources'
	@echo 'make bench    all benchmarks (a quarter of an hour), then the tables and plots of the pages; ARGS="--device cuda"'
	@echo 'make bench-quick   a first impression of them (two minutes); ARGS="--only ratios" chooses suites'
	@echo 'make nightly  the tests that are too slow for make test'
	@echo 'make clean    remove what was built, but not $(VENV), which holds torch'

demo: $(stamps)/demo
	$(bin)/python examples/train_vae.py $(ARGS)

test: $(stamps)/test
	$(bin)/python -m pytest $(ARGS)

nightly: $(stamps)/test
	$(bin)/python -m pytest --slow -m slow $(ARGS)

bench: $(stamps)/bench
	$(bin)/python benchmarks/bench.py $(ARGS)
	$(bin)/python benchmarks/plots.py
	$(bin)/python benchmarks/table.py

bench-quick: $(stamps)/bench
	$(bin)/python benchmarks/bench.py --quick $(ARGS)

check: $(stamps)/check
	$(bin)/clang-format --dry-run -Werror $(cxx_files)
	$(bin)/ruff check .
	$(bin)/ruff format --check .
	$(bin)/mypy

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
	$(bin)/python -m pip install -e .
	$(bin)/python -m kl_ext
	@rm -f build/installed-in-* && touch $@

# The package is installed already: this adds what its extra names.
$(stamps)/demo $(stamps)/test $(stamps)/bench $(stamps)/check: $(package) pyproject.toml
	$(bin)/python -m pip install 'kl_ext[$(@F)]'
	@touch $@
