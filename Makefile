# Two commands do everything, set-up included:  make demo   make test
# What they install stays in .venv; `make clean` takes it all away.

PYTHON ?= python3
VENV   := .venv
PY     := $(VENV)/bin/python
SOURCES := pyproject.toml CMakeLists.txt $(shell find src native -type f -not -name '*.so' -not -path '*/__pycache__/*')

.PHONY: demo test test-all torture lint sanitize test-arm wheel bench clean

demo: $(VENV)/demo.stamp
	$(VENV)/bin/instantft demo

# Fast tests, in minutes. CI runs test-all.
test: $(VENV)/test.stamp
	$(PY) -m pytest -m "not slow"

test-all: $(VENV)/test.stamp
	$(PY) -m pytest

# Crashes, power cuts, full disks, garbage, wrong labels, a day's stream: docs/reliability.md. CI runs a twentieth.
SHARE := 1
torture: $(VENV)/test.stamp
	$(PY) -m tests.torture --share $(SHARE)

lint: $(VENV)/lint.stamp
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

# The core with AddressSanitizer and UndefinedBehaviorSanitizer under the engine tests.
sanitize: $(VENV)/lint.stamp
	tools/sanitize $(PY)

# The aarch64 build under qemu-user.
test-arm:
	tools/arm/test

wheel:
	tools/wheel

bench: $(VENV)/test.stamp
	$(PY) -m benchmarks.speed
	$(PY) -m benchmarks.threads_cache

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "instantft needs Python 3.10 or later, not $$($(PYTHON) --version 2>&1): set PYTHON=python3.x" >&2; exit 2; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	  echo "Python's venv module must work (Debian: apt-get install python3-venv)" >&2; exit 2; }
	@command -v $${CC:-cc} >/dev/null && command -v $${CXX:-c++} >/dev/null || \
	  echo "no C and C++ compiler found (Debian: apt-get install build-essential): only the slow NumPy engine will work" >&2
	$(PY) -m pip install --quiet --upgrade pip

$(VENV)/demo.stamp: $(SOURCES) | $(VENV)/bin/python
	@echo "installing instantft and what the demo needs into $(VENV), compiling the core: a minute or two"
	$(PY) -m pip install --quiet --upgrade ".[demo]"
	@touch $@

$(VENV)/test.stamp: $(SOURCES) | $(VENV)/bin/python
	$(PY) -m pip install --quiet --upgrade ".[test]"
	@touch $@

$(VENV)/lint.stamp: $(SOURCES) | $(VENV)/bin/python
	$(PY) -m pip install --quiet --upgrade ".[test,lint]"
	@touch $@
