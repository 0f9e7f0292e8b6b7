# `make demo` draws with the shipped models and trains one on; `make test` lints, checks types and tests. Both set themselves up.
# TORCH: what to install before all else, in pip's words, where PyTorch's default wheels are not what you want.
PYTHON ?= python3
TORCH ?=
VENV := .venv
RUN := $(VENV)/bin/python
STAMP := $(VENV)/.installed

.PHONY: demo test clean

$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --upgrade pip
	$(if $(strip $(TORCH)),$(RUN) -m pip install --quiet $(TORCH))
	$(RUN) -m pip install --quiet -e ".[dev]"
	touch $(STAMP)

demo: $(STAMP)
	$(RUN) experiments/demo.py

test: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check --quiet .
	$(VENV)/bin/mypy
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2

clean:
	rm -rf $(VENV) demo
