# Every target sets up what it needs by itself; a second call finds it done.
#
#   make demo [ARGS="--batch 128"]      the main job on real data, ends with the receipt
#   make test [ARGS="-k fused_linear"]  the unit suite;  make test-slow  the wide sweeps
#   make accept                         the long proofs in full -> tests/accept/results.json
#   make bench                          pytest-benchmark -> bench.json, .csv, .md, a .png per op
#   make lint                           ruff, mypy, clang-format
#   make gpu-report                     compile the GPU kernels for every target and read the code
#   make gpu-first-run                  gpu-first-run/: what the first minutes on an H200 need
#   make readme                         run what README.md shows, write what it printed into it
#   make wheel                          dist/*.whl with the CUDA C++ kernels, where nvcc is
#
# Choices (each also works on later calls; a changed choice re-installs):
#   PYTHON=python3.12        the interpreter that makes .venv
#   TORCH='torch==2.14.1'    another torch, any pip requirement
#   SYSTEM_TORCH=1           no torch is installed: the one that $(PYTHON) imports is reused
#   VENV=.venv               where the environment lives

PYTHON ?= python3
TORCH ?= torch==2.13.0
SYSTEM_TORCH ?= 0
VENV ?= .venv
ARGS ?=
# Test processes side by side: one for each core, and several tests of a file go to one of them.
WORKERS ?= auto
SIDE_BY_SIDE = $(if $(filter-out 0 1,$(WORKERS)),-n $(WORKERS) --dist loadfile)

override PINNED_TORCH := torch==2.13.0
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check --no-input install --quiet
CHOICE := $(if $(filter 1,$(SYSTEM_TORCH)),reuse of $(PYTHON),$(TORCH))
# Pins hold for the Python they were made on, and torch's own needs only for the pinned torch.
PINS = $(patsubst %,-c %,$(wildcard requirements/constraints-py$(shell $(PY) -c \
  'import sys; print("%d%d" % sys.version_info[:2])').txt)) \
  $(if $(filter $(PINNED_TORCH),$(CHOICE)),-c requirements/constraints-torch-2.13.0.txt)
BUILD_INPUTS := pyproject.toml setup.py $(shell find csrc -type f 2>/dev/null)

.PHONY: demo test test-slow accept bench lint gpu-report gpu-first-run readme wheel install dev clean FORCE
.DELETE_ON_ERROR:

demo: install
	$(VENV)/bin/bigops demo $(ARGS)

test: dev
	$(PY) -m pytest $(SIDE_BY_SIDE) $(ARGS)

test-slow: dev
	$(PY) -m pytest -m slow $(SIDE_BY_SIDE) $(ARGS)

accept: dev
	$(PY) -m pytest -m slow tests/accept tests/faults --accept-share 1 \
	  --accept-json tests/accept/results.json $(ARGS)

bench: dev
	$(PY) -m pytest benches --benchmark-json=bench.json $(ARGS)
	$(VENV)/bin/bigops bench --from-json bench.json --csv bench.csv --plot bench.png \
	  --summary bench.md

lint: dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(PY) -m mypy
	find csrc kernels -name '*.cpp' -o -name '*.h' -o -name '*.inl' -o -name '*.cu' \
	  -o -name '*.cuh' | xargs $(VENV)/bin/clang-format --dry-run -Werror

gpu-report: dev
	$(PY) tests/kernels/gpu_report/report.py $(ARGS)

# Needs no GPU; what it makes is carried to one.
gpu-first-run: $(PY)
	$(PY) tests/gpu/make_first_run.py $(ARGS)

# Nothing else should run beside it: times are shown.
readme: dev
	$(PY) docs/readme_output.py $(ARGS)

# One wheel for torch with and without CUDA; no nvcc: a warning, and the CPU kernels alone.
wheel: dev
	BIGOPS_CUDA=$${BIGOPS_CUDA-1} $(PY) -m pip --disable-pip-version-check wheel --quiet \
	  --no-build-isolation --no-deps --wheel-dir dist .

install: $(VENV)/.installed
dev: $(VENV)/.dev

$(PY):
	@$(PYTHON) -c 'import ensurepip, venv' || { echo "make: $(PYTHON) cannot make a virtual \
	environment: install its venv package (Debian: apt install python3-venv)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# Rewritten only when the choice of torch differs from the installed one, so that what depends on
# it stays as it is otherwise.
$(VENV)/.torch: $(PY) FORCE
	@if [ "$$(cat $@ 2>/dev/null)" = "$(CHOICE)" ]; then exit 0; fi; set -e; \
	site=$$($(PY) -c 'import sysconfig; print(sysconfig.get_path("purelib"))'); \
	rm -f "$$site/reused_torch.pth"; \
	if [ "$(SYSTEM_TORCH)" = 1 ]; then \
	  $(PY) -m pip uninstall --quiet --yes torch 2>/dev/null; \
	  $(PYTHON) -c 'import os, torch; print(os.path.dirname(os.path.dirname(torch.__file__)))' \
	    > "$$site/reused_torch.pth" || { rm -f "$$site/reused_torch.pth"; \
	    echo "make: SYSTEM_TORCH=1, but $(PYTHON) cannot import torch" >&2; exit 1; }; \
	  $(PY) -c 'import torch' || { echo "make: $(PY) cannot load the torch of $(PYTHON)" >&2; exit 1; }; \
	else \
	  echo "installing $(TORCH)"; $(PIP) $(PINS) "$(TORCH)"; \
	fi; \
	$(PY) -c 'import triton' 2>/dev/null || $(PIP) $(PINS) triton || \
	  echo "make: no triton for this platform; the GPU kernels' tests will be skipped" >&2; \
	$(PIP) $(PINS) -r requirements/build.txt; \
	echo "$(CHOICE)" > $@

# Objects stay in build/, so a changed source costs its own compilation and one link.
$(VENV)/.installed: $(VENV)/.torch $(wildcard requirements/*.txt) $(BUILD_INPUTS)
	$(PIP) $(PINS) --no-build-isolation -e '.[demo]'
	@touch $@

$(VENV)/.dev: $(VENV)/.installed requirements/dev.txt requirements/ttsem.txt
	$(PIP) $(PINS) -r requirements/dev.txt
	@rm -rf $(VENV)/ttsem
	@$(PIP) --no-deps --ignore-requires-python --target $(VENV)/ttsem -r requirements/ttsem.txt || \
	  echo "make: no ttsem; the tests that run Triton's code by it will be skipped" >&2
	@touch $@

clean:
	rm -rf build dist *.egg-info bigops/*.so demo-out bench.csv bench.json bench.md bench-*.png
