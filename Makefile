# `make run` and `make test` need only this file, Python >= 3.11 with venv and pip, and a package index.
# Set-up is done once per content of pyproject.toml: a stamp file in .venv remembers it.

.DEFAULT_GOAL := help
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c

# The first interpreter that is new enough; override with `make run PYTHON=/path/to/python`.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
# Torch is installed by itself, first: whatever build of it is at hand (or already there) then satisfies the rest.
TORCH ?= torch>=2.11,<2.14
# Further arguments for that one install, for example to take a CPU build: make run TORCH_ARGS="--index-url ..."
TORCH_ARGS ?=

VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed-$(shell cksum < pyproject.toml | cut -d' ' -f1)
PROMPTS := src/moesaic/assets/prompts.txt

# Every file of benchmarks/ stands in exactly one list (a test checks): what runs on any machine, what does so for long,
# what needs a GPU, and what is no benchmark but is shared by them.
BENCH_CPU := load_memory.py cpu_generate.py sensitivity.py quantize_memory.py kv_b_proj.py rounding.py schemes.py kv_format.py serve_overhead.py serve_load.py serve_soak.py
BENCH_GPU := experts.py gemm.py route.py attention.py throughput.py schemes_gpu.py
BENCH_LONG := planner_proof.py
BENCH_LIBRARY := machine.py gpu.py models.py warm.py serving.py

# Two test processes of one thread each: small tensors gain nothing from threads, and lose much on a busy machine.
ONE_THREAD := OMP_NUM_THREADS=1

.PHONY: help setup run serve test test-long test-gpu check bench docs train-tiny dist clean distclean

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: $(STAMP) ## make .venv and install Moesaic with its development tools (once)

$(STAMP):
	@test -n "$(PYTHON)" || { echo "No Python >= 3.11 found; name one: make run PYTHON=/path/to/python3.11"; exit 2; }
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check $(TORCH_ARGS) "$(TORCH)"
	$(PY) -m pip install --quiet --disable-pip-version-check --editable ".[dev]"
	@rm -f $(VENV)/.installed-*
	@touch $@

run: $(STAMP) ## answer a fixed set of prompts with the embedded model
	$(PY) -m moesaic generate --file $(PROMPTS)

serve: $(STAMP) ## serve the embedded model on http://127.0.0.1:8000/v1
	$(PY) -m moesaic serve

test: $(STAMP) ## the tests (at most 10 minutes on 2 cores)
	$(ONE_THREAD) $(PY) -m pytest -n 2 --dist worksteal --durations=10

test-long: $(STAMP) ## the tests that are too slow for `make test`
	$(PY) -m pytest -m "long and not gpu" --timeout 7200 --durations=20

test-gpu: $(STAMP) ## the tests that need a CUDA device
	$(PY) -m pytest -m gpu --timeout 1800 --durations=20

check: $(STAMP) ## lint, types, and the law of the house
	$(PY) -m ruff check .
	$(PY) -m mypy
	$(PY) -m pytest -q tests/test_architecture.py tests/test_structure_doc.py

bench: $(STAMP) ## the benchmarks that run on a CPU
	@for name in $(BENCH_CPU); do echo "== benchmarks/$$name"; $(PY) benchmarks/$$name; done

docs: $(STAMP) ## regenerate what is drawn and tabulated from the code
	$(PY) -m scripts.draw_structure
	$(PY) -m scripts.readme_tables

train-tiny: $(STAMP) ## train the embedded model again (needs a GPU)
	$(PY) -m training.train --out src/moesaic/assets/tiny

dist: $(STAMP) ## build the sdist and the wheel into dist/
	rm -rf build dist
	$(PY) -m build --outdir dist .

clean: ## remove what builds and tests leave behind
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis src/*.egg-info
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +

distclean: clean ## and the virtual environment
	rm -rf $(VENV)

.PHONY: print-torch
print-torch:
	@echo "$(TORCH)"
