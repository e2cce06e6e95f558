"""Checks with a real language model; `make slow`."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import assert_same, weights
from peft import LoraConfig
from transformers import AutoModelForCausalLM, TrainerCallback

from es_trainer import ESConfig, ESTrainer, replay
from es_trainer.smollm2 import smollm2
from es_trainer.tasks import conciseness, countdown


pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent


def make_trainer(tmp_path, task, **options) -> ESTrainer:
    args = ESConfig(
        str(tmp_path / "run"),
        use_cpu=True,
        population_size=3,
        num_prompts_per_step=2,
        max_completion_length=8,
        max_steps=2,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        **options,
    )
    return ESTrainer(smollm2(), task.reward_funcs, args, task.train_dataset, task.eval_dataset)


class Working(TrainerCallback):
    """The weights that the model computes with, before the members of a step and after them."""

    def on_step_begin(self, args, state, control, model, **kwargs):
        self.before = weights(model)

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        self.after = weights(model)


@pytest.mark.parametrize("bf16", [False, True])
def test_a_population_leaves_the_weights_bit_identical(tmp_path, bf16):
    trainer = make_trainer(tmp_path, conciseness(eval_size=2), bf16=bf16, sigma=0.02)
    working = Working()
    trainer.add_callback(working)
    trainer.train()
    assert {tensor.dtype for tensor in working.before.values()} == {torch.bfloat16 if bf16 else torch.float32}
    assert_same(working.after, working.before)
    assert trainer.state.log_history[0]["reward_std"] > 0


@pytest.mark.parametrize("options", [{}, {"weight_quantization": "int8"}, {"weight_quantization": "fp8"}])
def test_members_are_evaluated_together(tmp_path, options):
    """In bfloat16, rounding moves the answers that are compared at the start."""
    trainer = make_trainer(tmp_path, conciseness(eval_size=2), perturbation="low_rank", bf16=True, **options)
    assert trainer.population_batch is not None


@pytest.mark.parametrize(
    "task", [conciseness(eval_size=2), countdown(train_size=8, eval_size=2)], ids=lambda t: t.name
)
def test_a_run_can_be_saved_loaded_and_replayed(tmp_path, task):
    trainer = make_trainer(tmp_path, task, sigma=0.01, learning_rate=0.01, bf16=True)
    trainer.train()
    trainer.evaluate()
    trainer.save_model(str(tmp_path / "model"))
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "model").state_dict()
    rebuilt = replay(smollm2(), tmp_path / "run").state_dict()
    assert all(torch.equal(rebuilt[name], saved[name]) for name in saved)


def test_readme_script(tmp_path):
    (script,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (tmp_path / "script.py").write_text(script)
    subprocess.run([sys.executable, "script.py"], cwd=tmp_path, check=True)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "brief" / "model").num_parameters() == 134_515_008


def test_quickstart_improves_the_held_out_reward(tmp_path):
    command = [sys.executable, str(ROOT / "examples" / "quickstart.py")]
    output = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout
    before, after = map(float, re.search(r"Held-out reward: (\S+) before, (\S+) after", output).groups())
    assert after > before + 20
    assert "Loaded again from" in output and output.rstrip().endswith("README.md lists the other pages.")
    assert (tmp_path / "quickstart" / "reward.png").is_file()


@pytest.mark.parametrize("seed", [1, 3])
def test_members_of_an_adapter_are_evaluated_together(tmp_path, seed):
    # The range of sigmas that tells members apart, and not yet makes chaos of rounding, is narrow in bfloat16, and
    # another one for each adapter
    task = conciseness()
    args = ESConfig(str(tmp_path / "run"), use_cpu=True, bf16=True, perturbation="low_rank", seed=seed)
    adapter = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = ESTrainer(smollm2(), task.reward_funcs, args, task.train_dataset, peft_config=adapter)
    assert trainer.backend.population_batch is not None
