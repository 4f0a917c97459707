# One command a job. Each sets up what it needs (.venv, the extension) and is quick when repeated.

TORCH ?= torch==2.11.0
PYTHON ?= python3
VENV ?= .venv
CORES := $(shell getconf _NPROCESSORS_ONLN)

PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check
SOURCES := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu')
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)

.PHONY: help demo test bench tables docs bench-check gpu-check mutate sanitize races install-check lint clean FORCE

help: ## show this list
	@sed -n 's/^\([a-z-]*\):.*## /make \1\t/p' Makefile | expand -t 16
	@echo "Another torch or Python: make test TORCH=torch==2.13.0 PYTHON=python3.12 VENV=.venv312"

demo: $(VENV)/built ## train plain and residual nets on real digits and draw the picture (a minute)
	@mkdir -p build
	$(PY) -m fusedres demo --out build/degradation.png

test: $(VENV)/built ## run all tests, in parallel
	$(PY) -m pytest tests -n $(CORES) --dist worksteal

bench: $(VENV)/built ## time fused against eager and torch.compile, judge the goals, then `make tables` (10 minutes)
	$(PY) -m bench
	@$(MAKE) --no-print-directory tables

tables: $(VENV)/installed ## write the newest results into README and docs, as tables and pictures
	$(PY) -m bench report --write
	$(PY) -m bench stacks --write
	$(PY) -m bench models --write
	$(PY) -m bench memory --write
	$(PY) -m bench scaling --write >/dev/null

docs: ## build the pages of docs/ into build/site
	@$(PY) -c "import material, mkdocstrings" 2>/dev/null || \
		{ echo "make docs: first $(PY) -m pip install mkdocs-material 'mkdocstrings[python]'"; exit 1; }
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict --quiet

bench-check: $(VENV)/built ## has fused become slower against eager? Times, and instructions by valgrind
	$(PY) -m bench check $(ARGS)

gpu-check: ## build, test and measure on this GPU, with the Python at hand and no network (9 minutes)
	$(PYTHON) -m bench.gpu $(ARGS)

mutate: $(VENV)/built ## break the kernels on purpose and count how many breaks the tests catch
	$(PY) tests/mutate.py

# The path comes before the tree's own package; without -k a process of its own would not see it.
sanitize: $(VENV)/installed ## the CPU kernels' tests with AddressSanitizer and UndefinedBehaviorSanitizer (5 minutes)
	FORCE_ONLY_CPU=1 CFLAGS="-O1 -g1 -fsanitize=address,undefined" LDFLAGS="-fsanitize=address,undefined" \
		$(PY) setup.py --quiet build --build-base build/sanitize
	LD_PRELOAD="$$($(CC) -print-file-name=libasan.so) $$($(CC) -print-file-name=libubsan.so)" \
		ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 \
		pytest -q -p no:cacheprovider -o pythonpath="$$(echo build/sanitize/lib*) tests" \
		tests/way/test_cpu_kernels.py tests/way/test_shapes.py -k "not instruction and not outside"

# Threads of our own in place of torch's OpenMP, of which ThreadSanitizer understands nothing. Without -R,
# address space is laid out in a way that some versions of it cannot use.
races: $(VENV)/installed ## the CPU kernels' threads with ThreadSanitizer (2 minutes)
	FORCE_ONLY_CPU=1 CFLAGS="-O1 -g1 -fsanitize=thread" LDFLAGS="-fsanitize=thread" \
		$(PY) setup.py --quiet build --build-base build/races
	$(CXX) -std=c++20 -O1 -g1 -fsanitize=thread -fPIC -shared tests/threads.cpp -o build/races/threads.so
	setarch -R env LD_PRELOAD="$$($(CC) -print-file-name=libtsan.so) build/races/threads.so" \
		TSAN_OPTIONS=ignore_noninstrumented_modules=1:halt_on_error=1 OMP_NUM_THREADS=1 \
		$(PY) -m pytest -q -s -p no:cacheprovider -o pythonpath="$$(echo build/races/lib*) tests" \
		tests/way/test_cpu_kernels.py -k "not instruction"

install-check: $(VENV)/installed ## install by every route into environments that are thrown away (ARGS=--quick: 3 minutes)
	$(PY) tests/install_check.py $(ARGS)

lint: $(VENV)/installed ## ruff, clang-format and mypy
	ruff check .
	ruff format --check .
	clang-format --dry-run -Werror $(SOURCES) tests/threads.cpp tests/emulation/cuda_on_cpu/*.cpp tests/emulation/cuda_on_cpu/*.h
	mypy

clean: ## remove .venv and everything built
	rm -rf $(VENV) build fusedres/_C*.so fusedres/without_extension.txt *.egg-info

# Holds the name of the torch that is wanted; touched only when that changes.
$(VENV)/torch: FORCE
	@test -x $(VENV)/bin/pip || { echo "Making $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@echo "$(TORCH)" | cmp -s - $@ || echo "$(TORCH)" > $@

$(VENV)/installed: $(VENV)/torch pyproject.toml
	@echo "Installing $(TORCH) and the tools into $(VENV) (a few minutes the first time)"
	$(PIP) install -qq $(TORCH) "setuptools>=77" wheel
	FUSEDRES_SKIP_EXT=1 $(PIP) install -qq --no-build-isolation $(TORCH) --editable ".[dev]"
	rm -rf build fusedres/_C*.so
	@touch $@

$(VENV)/built: $(VENV)/installed setup.py $(SOURCES)
	@echo "Building the extension"
	@$(PY) setup.py --quiet build_ext --inplace >$(VENV)/build.log 2>&1 || { cat $(VENV)/build.log; exit 1; }
	@grep ^fusedres: $(VENV)/build.log || true
	@touch $@
