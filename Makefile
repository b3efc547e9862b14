# `make help` says what there is. Everything runs in .venv, which `make setup` makes.

SHELL := /bin/sh
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

EXTRAS ?= dev# make setup EXTRAS=dev,cuda (or dev,tpu) for an accelerator
WORKERS ?= 2# processes that share the tests; 0 for none
PYTEST_ARGS ?=

PYTHON := .venv/bin/python
READY := .venv/.ready
PEERS_READY := .venv-peers/.ready
# An environment is ready for one folder and one set of extras.
export WANTED := $(CURDIR) [$(EXTRAS)]
ifneq ($(shell cat $(READY) 2>/dev/null),$(WANTED))
.PHONY: $(READY)
endif

# Prints the path of a Python >= 3.12. Each candidate on PATH is tried by running it,
# since a version manager's shim may exist and fail.
define FIND_PYTHON
IFS=:; \
for name in python3.12 python3 python; do \
  for folder in $$PATH; do \
    [ -x "$$folder/$$name" ] || continue; \
    "$$folder/$$name" -c 'import sys; sys.version_info >= (3, 12) or sys.exit(1); print(sys._base_executable)' 2>/dev/null && exit 0; \
  done; \
done; \
echo "flexjax needs Python 3.12 or newer, and no python3.12, python3 or python on PATH is one: install Python 3.12 and run make again" >&2; \
exit 1
endef

# The same for the peers, whose torch needs 3.11. A shim of pyenv listens to PYENV_VERSION.
define FIND_PEERS_PYTHON
IFS=:; \
for name in python3.11 python3 python; do \
  for folder in $$PATH; do \
    [ -x "$$folder/$$name" ] || continue; \
    PYENV_VERSION=3.11 "$$folder/$$name" -c 'import ensurepip, sys; sys.version_info[:2] == (3, 11) or sys.exit(1); print(sys._base_executable)' 2>/dev/null && exit 0; \
  done; \
done; \
echo "the peers need Python 3.11, and no python3.11, python3 or python on PATH is one: install Python 3.11 and run make peers again" >&2; \
exit 1
endef

.PHONY: help setup peers demo test pytest lint format clean

help:
	@echo "make setup    the environment in .venv (EXTRAS=dev,cuda for an NVIDIA GPU)"
	@echo "make peers    what bench.compare compares with, in .venv-peers (Python 3.11)"
	@echo "make demo     a plan for a larger model, and the embedded one writes from all tiers"
	@echo "make test     linters, type checker and the whole test suite"
	@echo "make lint     only the linters and the type checker"
	@echo "make format   lets ruff rewrite the code"
	@echo "make clean    removes the environments and all caches"

setup: $(READY)

# .venv.unfinished stands while .venv may be half-made: the next set-up then starts over.
# A .venv made by hand is used as it is, and never removed while its Python serves.
$(READY): pyproject.toml constraints.txt
	@set -eu; trap 'exit 130' INT TERM HUP; \
	mark=.venv.unfinished; \
	if [ -e $$mark ]; then rm -rf .venv; fi; \
	if ! $(PYTHON) -c 'import sys; sys.version_info >= (3, 12) or sys.exit(1)' 2>/dev/null; then \
	  python=$$($(FIND_PYTHON)); \
	  echo "making .venv with $$python"; \
	  : > $$mark; \
	  rm -rf .venv; \
	  if command -v uv >/dev/null 2>&1; then \
	    uv venv --quiet --no-python-downloads --python "$$python" .venv; \
	  else \
	    "$$python" -m venv .venv; \
	  fi; \
	  made=yes; \
	elif [ -e $(READY) ]; then : > $$mark; made=no; \
	else made=no; \
	fi; \
	rm -f $(READY); \
	echo "installing flexjax[$(EXTRAS)] into .venv"; \
	if command -v uv >/dev/null 2>&1; then \
	  install="uv pip install --python $(PYTHON)"; \
	else \
	  install="$(PYTHON) -m pip install --disable-pip-version-check"; \
	  $(PYTHON) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m ensurepip >/dev/null; \
	fi; \
	$$install --quiet -c constraints.txt -e '.[$(EXTRAS)]' || { \
	  status=$$?; \
	  if [ $$made = no ] && [ $$status -lt 128 ]; then rm -f $$mark; fi; \
	  exit $$status; \
	}; \
	printf '%s\n' "$$WANTED" > $(READY); \
	rm -f $$mark

peers: $(PEERS_READY)

$(PEERS_READY): bench/peers/constraints.txt
	@set -eu; \
	python=$$($(FIND_PEERS_PYTHON)); \
	echo "making .venv-peers with $$python"; \
	rm -rf .venv-peers; \
	"$$python" -m venv .venv-peers; \
	.venv-peers/bin/python -m pip install --disable-pip-version-check --quiet \
	  -c bench/peers/constraints.txt accelerate safetensors torch transformers; \
	touch $(PEERS_READY)

demo: setup
	$(PYTHON) -m flexjax.plan facebook/opt-6.7b --hardware t4-208gb --num-prompts 144
	$(PYTHON) -m flexjax.generate \
	  --prompt "It is a truth universally acknowledged, that" "She had never seen" \
	  "My dear Miss Woodhouse," "The rain had stopped, and" \
	  --max-tokens 48 --temperature 0.8 --top-p 0.9 \
	  --weights device=0.2,host=0.3 --kv-cache device=0.3,host=0.3 \
	  --activations host=1 --batch-size 2 --num-batches 2

lint: setup
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m pyright

# Side by side with `make -j2 test`.
test: lint pytest

pytest: setup
	$(PYTHON) -m pytest -n $(WORKERS) --dist loadgroup $(PYTEST_ARGS)

format: setup
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .

clean:
	rm -rf .venv .venv.unfinished .venv-peers .pytest_cache .ruff_cache .hypothesis build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
