# make demo | test | test-slow | test-gpu | gpu | lint | format | clean
# Each target sets itself up: a virtual environment in .venv with the tested versions.
SHELL := /bin/bash
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: demo docs tutorials test test-slow test-gpu gpu gpu-bundle gpu-offline lint format clean

$(READY): setup.py constraints.txt kernels/ops/native.c
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "genmodels needs Python >= 3.11, $(PYTHON) is $$($(PYTHON) -V 2>&1); try: make PYTHON=python3.11" >&2; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv || { rm -rf .venv; exit 1; }
	@echo "Installing torch, lightning, diffusers and the rest into .venv: about 6 GB, a few minutes."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]' -c constraints.txt
	@touch $@

demo: $(READY)
	$(BIN)/python -m benchmarks.demo

# A worker for each core, so one thread for each worker.
test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile

test-slow: $(READY)
	$(BIN)/python -m pytest -m slow

test-gpu: $(READY)
	$(BIN)/python -m pytest -m gpu

# On a machine with a GPU and GENMODELS_DATA set: the checks, the kernels' times, then the measured
# training. They fetch nothing: .venv where there is one, else whatever PYTHON has.
HERE = $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))
gpu:
	$(HERE) -m pytest -m gpu
	$(HERE) -m benchmarks --device cuda --json benchmarks/results/gpu.json --markdown benchmarks/results/gpu.md
	$(HERE) -m benchmarks.edm_fashion

# Without a network: `make gpu-bundle` where there is one; there, in BUNDLE/repo, `make gpu-offline`.
BUNDLE ?= build/gpu
gpu-bundle:
	$(HERE) benchmarks/gpu_offline.py pack out=$(BUNDLE)

gpu-offline:
	-$(HERE) benchmarks/gpu_offline.py kernels out=runs/gpu
	$(HERE) benchmarks/gpu_offline.py training out=runs/gpu

# The pages and the classes as a site: build/site/README.html.
docs: $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[docs]' -c constraints.txt
	NO_MKDOCS_2_WARNING=1 $(BIN)/python docs/site.py

# The tutorials, run from top to bottom with their outputs kept.
tutorials: $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[docs]' -c constraints.txt
	for book in $(wildcard docs/tutorials/*.ipynb); do \
	  rm -rf build/tutorial && mkdir -p build/tutorial && cp $$book build/tutorial && \
	  (cd build/tutorial && PATH="$(CURDIR)/$(BIN):$$PATH" jupyter execute --inplace *.ipynb) && \
	  cp build/tutorial/*.ipynb $$book || exit 1; done

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv kernels/ops/_native*.so build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .import_linter_cache
