# Every target installs what it needs into .venv, from a bare machine on.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --constraint constraints.txt

.PHONY: quickstart test slow bench lint clean

quickstart: $(VENV)/quickstart
	$(BIN)/python examples/quickstart.py

test: $(VENV)/dev
	$(BIN)/python -m pytest -m "not slow"

slow: $(VENV)/dev
	$(BIN)/python -m pytest -m slow

bench: $(VENV)/dev
	$(BIN)/python benchmarks/noise.py
	$(BIN)/python benchmarks/iteration.py
	$(BIN)/python benchmarks/population.py
	$(BIN)/python benchmarks/scaling.py
	$(BIN)/python benchmarks/vs_grpo.py
	$(BIN)/python benchmarks/memory.py
	$(BIN)/python benchmarks/drift.py

lint: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf $(VENV) quickstart build *.egg-info

$(BIN)/pip:
	$(PYTHON) -m venv $(VENV)

# torch first: what depends on it then takes this build of it
$(VENV)/torch: constraints.txt | $(BIN)/pip
	$(PIP) --upgrade pip
	$(PIP) torch
	touch $@

$(VENV)/quickstart $(VENV)/dev: $(VENV)/%: setup.py $(VENV)/torch
	$(PIP) --editable '.[$*]'
	touch $@
