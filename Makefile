# One target per daily act. The first call makes .venv and installs into it; later calls start at once.
#
#   make demo     fine-tune the bundled model and show before and after (about 3 minutes on 2 cores, once installed)
#   make test     run the tests               (make test ARGS="tests/ops -k bf16" for some of them)
#   make lint     check format, style, types   make format   put the format right
#   make sanitize run the operators' tests on CPU kernels that AddressSanitizer watches
#   make bench    quick benchmarks             make clean    remove what was built, .venv included
#
#   PYTHON=...        the interpreter to make .venv from, 3.11 or newer
#   TORCH_INDEX=...   where the CPU build of torch comes from if pip's own index has none

PYTHON ?= $(shell command -v python3.11 || command -v python3)
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# torch's version stands in the lock and nowhere else.
TORCH := $(shell grep '^torch==' requirements-dev.lock)
CPP := $(shell find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

# The tests are many small computations, which threads that wait for each other make slower: two processes
# of one thread each.
TEST_THREADS ?= 1
TEST_WORKERS ?= 2

.PHONY: demo test sanitize lint format bench clean install
.DELETE_ON_ERROR:

demo: install
	$(BIN)/rewardprop quickstart $(ARGS)

test: install
	OMP_NUM_THREADS=$(TEST_THREADS) $(BIN)/python -m pytest -n $(TEST_WORKERS) --dist worksteal $(ARGS)

sanitize: install
	OMP_NUM_THREADS=$(TEST_THREADS) $(BIN)/python -m tools.sanitize $(ARGS)

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CPP)

format: install
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

bench: install
	$(BIN)/python -m benchmarks.quick $(ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	rm -f rewardprop_fast/_native* rewardprop_fast/_cuda*
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# --- installation -----------------------------------------------------------------------------------------------
# A stamp file for each step; a step runs again where what it depends on is newer.

install: $(VENV)/.package

# The package itself, editable, with the native module built by the locked tools (so without build isolation).
$(VENV)/.package: $(VENV)/.requirements setup.py pyproject.toml CMakeLists.txt csrc/cuda/CMakeLists.txt rewardprop_fast/version.py $(CPP)
	$(PIP) install --quiet --no-deps --no-build-isolation --editable .
	@test ! -f rewardprop_fast/_native_missing.txt || \
	  { printf 'warning: installed without the native module: '; cat rewardprop_fast/_native_missing.txt; } >&2
	@touch $@

# torch first and alone: PyPI's build for Linux brings several GB of CUDA with it, the +cpu build does not.
$(VENV)/.requirements: $(VENV)/.created requirements-dev.lock
	@$(PIP) install --quiet --no-deps "$(TORCH)+cpu" 2>/dev/null || \
	  $(PIP) install --quiet --no-deps --index-url $(TORCH_INDEX) "$(TORCH)" || \
	  { echo "error: no CPU build of $(TORCH) was found; name an index that has it: make TORCH_INDEX=URL" >&2; exit 1; }
	$(PIP) install --quiet --requirement requirements-dev.lock
	@touch $@

$(VENV)/.created:
	@test -n "$(PYTHON)" || { echo "error: no python3 was found; install Python 3.11 or newer" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: $(PYTHON) is too old for the locked versions; use Python 3.11 or newer: make PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "error: $(PYTHON) cannot make virtual environments (on Debian: apt install python3-venv)" >&2; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)
	@touch $@
