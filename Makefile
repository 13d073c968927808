# Everything that users, developers and CI do with the sources, in a virtual environment made here. `make help` prints the group
# headings (##@) and the text after ## beside each target.
#
# Variables: PYTHON (python3), VENV (.venv), TORCH (a torch version, for `make wheels` also several; unset: the one installed in
# VENV, else the newest), ARGS (passed on to the demo, the tests or the benchmarks), WORKERS (the processes that share the tests;
# 0: a single one without pytest-xdist), LOCK (a file with versions and hashes of all that is installed besides torch, as CI has
# it), and the build's own: KL_EXT_CUDA, TORCH_CUDA_ARCH_LIST, MAX_JOBS.
PYTHON ?= python3
VENV ?= .venv
TORCH ?=
ARGS ?=
LOCK ?=
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
cxx_files = $(shell find csrc tests benchmarks examples -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

oldest = $(shell sed -n 's/^MINIMUM = "\(.*\)"/\1/p' cmake/torch_info.py)

.PHONY: help demo test docs bench-quick clean check format lock test-oldest test-matrix test-cuda-emulation \
  test-asan test-tsan test-memory check-cuda check-instructions test-compilers fuzz fuzz-cpp test-exhaustive nightly bench wheels
.DELETE_ON_ERROR:

##@ For users

help: ## list the targets
	@awk -F ':.*## ' '/^##@ / { print (groups++ ? "\n" : "") substr($$0, 5) } \
	  /^[a-z-]+:.*## / { printf "  make %-19s  %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

demo: $(stamps)/demo ## train a small VAE on the digits of scikit-learn; ARGS="--epochs 5" and so on
	$(bin)/python examples/train_vae.py $(ARGS)

test: $(stamps)/test ## run the test-suite; ARGS="-k name" chooses tests, TORCH=2.13.0 a torch version
	$(bin)/python -m pytest -n $(WORKERS) $(ARGS)

docs: $(stamps)/docs ## build the documentation as a site, build/docs/index.html
	$(bin)/sphinx-build -W --keep-going -n -q docs build/docs
	@echo "built: build/docs/index.html"

bench-quick: $(stamps)/bench ## a first impression of the benchmarks (two minutes); ARGS="--only ratios" chooses suites
	$(bin)/python benchmarks/bench.py --quick $(ARGS)

clean: ## remove what was built, but not the virtual environments, which hold torch
	rm -rf build dist *.egg-info kl_ext/*.so kl_ext/include kl_ext/lib kl_ext/share

##@ For developers

check: $(stamps)/check ## run clang-format, ruff and mypy; they change nothing
	$(bin)/clang-format --dry-run -Werror $(cxx_files)
	$(bin)/ruff check .
	$(bin)/ruff format --check .
	$(bin)/mypy

format: $(stamps)/check ## let clang-format and ruff rewrite the sources
	$(bin)/clang-format -i $(cxx_files)
	$(bin)/ruff check --fix .
	$(bin)/ruff format .

# Run it when an extra of pyproject.toml changes: what .ci/run installs comes from the lock alone.
lock: $(stamps)/test ## renew .ci/lock.txt, the versions and hashes of what CI installs
	$(bin)/python .ci/lock.py

# The oldest torch that is supported, in an environment of its own; without CUDA kernels, since it is the API that differs.
test-oldest: ## run the test-suite with the oldest torch that is supported
	$(MAKE) test VENV=.venv-oldest TORCH=$(oldest).0 KL_EXT_CUDA=0

# What it needs here is what its report is written with. It finds each Python on the PATH, in pyenv, or by uv.
test-matrix: $(stamps)/test ## build and test with each torch and Python (hours); writes docs/reports/matrix.md
	$(bin)/python tests/matrix.py $(ARGS)

# Sanitized, threads take turns in one order of the three, and tensors are cut at one limit. The sanitizers have to be there
# before Python allocates anything.
emulation := tests/cuda/test_cuda_emulation
test-cuda-emulation: $(stamps)/test ## run the CUDA kernels without a GPU, then again under sanitizers
	$(bin)/python -m pytest -n $(WORKERS) $(emulation)*.py $(ARGS)
	LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so) $$(g++ -print-file-name=libstdc++.so)" \
	  KL_EXT_EMULATION_SANITIZE=1 ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	  $(bin)/python -m pytest -n $(WORKERS) $(emulation).py $(emulation)_sums.py $(emulation)_cuts.py -k 'random and not 4096' $(ARGS)

# build/NAME/package/kl_ext is a copy of the package with sanitized libraries, which PYTHONPATH puts before the installed one.
# `python -m pytest` would put the package of the source folder before both.
define build-sanitized
	PATH="$(abspath $(bin)):$$PATH" cmake -S . -B build/$(1) -G Ninja -DPython_EXECUTABLE="$(abspath $(bin)/python)" \
	  -DCMAKE_CXX_FLAGS="$(2) -fno-omit-frame-pointer -g1"
	PATH="$(abspath $(bin)):$$PATH" cmake --build build/$(1) $(if $(MAX_JOBS),--parallel $(MAX_JOBS))
	$(bin)/cmake --install build/$(1) --prefix build/$(1)/package/kl_ext
	cp kl_ext/*.py build/$(1)/package/kl_ext/
endef

# ARGS="tests/layouts -k memory" runs some and writes nothing. -fsanitize=vptr needs what torch does not export.
comma := ,
test-asan: export KL_EXT_CUDA = 0
test-asan: $(stamps)/test ## run the suite under sanitizers (20 minutes); writes docs/reports/asan.md
	$(call build-sanitized,asan,-fsanitize=address$(comma)undefined -fno-sanitize=vptr -fno-sanitize-recover=undefined)
	WORKERS=$(WORKERS) $(bin)/python tests/asan.py $(ARGS)

test-tsan: export KL_EXT_CUDA = 0
# ARGS=60 sets how many seconds, and writes nothing.
test-tsan: $(stamps)/test ## run threads that share everything under ThreadSanitizer; writes docs/reports/tsan.md
	$(call build-sanitized,tsan,-fsanitize=thread)
	$(bin)/python tests/threads/tsan.py $(ARGS)

test-memory: $(stamps)/test ## measure what kept memory costs and saves, and long runs; writes docs/reports/memory.md
	$(bin)/python tests/memory.py

# ARGS="--write" for csrc/cuda/README.md too. What it takes besides nvcc and c++filt comes with a CUDA torch.
check-cuda: export KL_EXT_CUDA = all
check-cuda: $(package) ## build the CUDA kernels, which needs nvcc and no GPU, and check their machine code
	$(bin)/python csrc/cuda/sass/check.py $(ARGS)

# Of the CPU kernels and calls, which a busy machine does not change; needs valgrind.
check-instructions: $(stamps)/test ## count the instructions of the CPU kernels and compare them with their ceilings
	$(bin)/python benchmarks/instructions/count.py $(ARGS)

# Those in the PATH: g++-10 to g++-15, clang++-14 to clang++-20, and aarch64-linux-gnu-g++ with qemu-aarch64.
test-compilers: $(stamps)/test ## hash the results of the CPU kernels from every compiler; writes docs/reports/compilers.md
	$(bin)/python tests/compilers.py

# ARGS="--seed 7" repeats a run.
fuzz: $(stamps)/test ## run 100,000 random scripts (an hour) until one is wrong; writes docs/reports/fuzz.md
	$(bin)/python tests/fuzz/fuzz.py $(ARGS)

# Needs a clang++ with libFuzzer; inputs are kept in build/fuzz/corpus. ARGS="--seconds 600 sums" chooses a target.
fuzz-cpp: $(stamps)/test ## fuzz the headers against slow twins, a minute for each target; writes docs/reports/fuzz-cpp.md
	$(bin)/python tests/fuzz/headers.py $(ARGS)

# Alone on two cores; needs g++ or another compiler as CXX. ARGS="--only climb --seed 7" runs a part and writes nothing.
test-exhaustive: $(stamps)/test ## measure errors on every float32 and 16-bit pair; writes docs/reports/exhaustive.md
	$(bin)/python tests/exhaustive/exhaustive.py $(ARGS)

# ARGS="-n 2 tests/layouts" runs some, two at a time; the others keep their last results.
nightly: $(stamps)/test ## run the tests that are too slow for make test (an hour); writes docs/reports/nightly.md
	$(bin)/python tests/nightly.py $(ARGS)

# On a GPU: benchmarks/README.md. ARGS="--device cuda" only writes benchmarks/results/cuda.json.
bench: $(stamps)/bench ## run all benchmarks (half an hour), then renew the tables and plots of the pages
	$(bin)/python benchmarks/bench.py $(ARGS)
	$(bin)/python benchmarks/plots.py
	$(bin)/python benchmarks/table.py

# Each against a torch in an environment of its own. Only a CUDA build of torch takes KL_EXT_CUDA=all and nvcc.
wheels: $(stamps)/wheels ## build and test wheels, in dist; TORCH="2.13 2.14.1+cu130" names versions of torch
	$(bin)/python build_backend/wheels.py $(if $(TORCH),--torch $(TORCH)) $(ARGS)

$(stamps)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "kl_ext needs Python 3.10 or later; $(PYTHON) is $$($(PYTHON) --version 2>&1). Try PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || \
	  { echo "$(PYTHON) lacks the venv module; on Debian and Ubuntu: apt install python3-venv"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(if $(LOCK),$(bin)/python -m pip install --require-hashes --no-deps -r $(LOCK))
	@mkdir -p $(stamps) && touch $@

$(torch): $(stamps)/python
	$(bin)/python -m pip install $(if $(TORCH),torch==$(TORCH),torch)
	@rm -f $(stamps)/torch-* && touch $@

$(package): $(torch) $(sources)
	PATH="$(abspath $(bin)):$$PATH" \
	  $(bin)/python -m pip install -v $(if $(LOCK),--no-index --no-build-isolation) -e .  # -v: the build shows how far it is
	$(bin)/python -m kl_ext
	@rm -f build/installed-in-* && touch $@

# The tools of the extra alone: the package itself is not installed here.
$(stamps)/wheels: $(stamps)/python pyproject.toml
	$(bin)/python -m pip install $(shell sed -n 's/^wheels = \[\(.*\)\]/\1/p' pyproject.toml | tr -d ,)
	@touch $@

# The package is installed already: this adds what its extra names.
$(stamps)/demo $(stamps)/test $(stamps)/docs $(stamps)/bench $(stamps)/check: $(package) pyproject.toml
	$(bin)/python -m pip install $(if $(LOCK),--no-index) 'kl_ext[$(@F)]'
	@touch $@
