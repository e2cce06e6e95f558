"""Whatever a config says, a step runs, or it is refused before the model is loaded by a message that names a field."""

import functools
import math
import re
import tempfile
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import TINY_RUN, letters
from datasets import Dataset
from hypothesis import HealthCheck, example, given, note, settings
from hypothesis import strategies as st

from es_trainer import ESConfig, ESTrainer, trainer
from es_trainer.scripts.es import make_parser


FAST = settings(max_examples=25, deadline=None, derandomize=True, database=None)
MANY = settings(max_examples=1500, deadline=None, database=None, suppress_health_check=list(HealthCheck))

NONSENSE = ["nonsense", "", [], {}, -1, None, math.nan]
NUMBERS = [0.0, 0.1, 0.5, 1.0, -0.5, 1e-300, 1e30, math.inf, math.nan, "1e-3", "0.5", "many", None, True]
COUNTS = [1, 2, 3, 4, 0, -1, 2.0, 1.5, "2", "two", None, math.inf, math.nan]
SWITCHES = [True, False, "true", "false", 0, 1, "perhaps", None]


def choice(*values: Any) -> list[Any]:
    return [*values, *NONSENSE]


VALUES = {
    # the evolution strategy
    "population_size": COUNTS,
    "population_size_schedule": choice(None, {"1": 4}, {"1": 3}, '{"2": 2}', {"x": 4}, {"1": "y"}, {"0": 4}, [4]),
    "sigma": NUMBERS,
    "sigma_schedule": choice("constant", "linear", "cosine"),
    "sigma_min_ratio": NUMBERS,
    "learning_rate": [*NUMBERS, "sigma/2", "0.5 * sigma", "sigma/0"],
    "antithetic": SWITCHES,
    "num_steps_per_population": COUNTS,
    "perturbation": choice("gaussian", "low_rank"),
    "perturbation_rank": COUNTS,
    "population_batch_size": COUNTS,
    "fitness_shaping": choice("z_score", "centered_rank", "none", "prompt_centered"),
    "master_weights": choice("device", "host", "none"),
    "weight_quantization": choice(None, "int8", "fp8"),
    "es_optimizer": choice("sgd", "momentum", "adam"),
    "adam_beta1": NUMBERS,
    "adam_beta2": NUMBERS,
    "adam_epsilon": NUMBERS,
    "weight_decay": NUMBERS,
    "anchor_decay": NUMBERS,
    "anchor_penalty": choice("l2", "l1"),
    "anchor_weights": choice("device", "host", "model"),
    "evaluate_center": SWITCHES,
    "auto_step": COUNTS,
    "auto_step_prompts": COUNTS,
    "skip_settled_prompts": NUMBERS,
    "unique_prompts": SWITCHES,
    "num_prompts_per_step": COUNTS,
    "num_prompts_per_step_schedule": choice(None, {"1": 1}, {"1": 0}, "{"),
    "consistency_check_steps": COUNTS,
    "per_device_train_batch_size": COUNTS,
    "gradient_accumulation_steps": COUNTS,
    "bf16": SWITCHES,
    "seed": COUNTS,
    "data_seed": COUNTS,
    # the schedule and what is logged, saved and evaluated
    "lr_scheduler_type": choice("constant", "linear", "cosine", "constant_with_warmup", "polynomial"),
    "lr_scheduler_kwargs": choice(None, {"num_cycles": 2}, '{"a": 1}'),
    "warmup_steps": COUNTS,
    "num_train_epochs": NUMBERS,
    "max_steps": [1, "1", -1, 1.5, None, "one"],
    "logging_steps": COUNTS,
    "logging_strategy": choice("steps", "no", "epoch"),
    "eval_strategy": choice("steps", "no", "epoch"),
    "eval_steps": COUNTS,
    "eval_kl_prompts": COUNTS,
    "save_strategy": choice("no", "steps", "epoch", "best"),
    "save_steps": COUNTS,
    "save_total_limit": COUNTS,
    "load_best_model_at_end": SWITCHES,
    "metric_for_best_model": choice(None, "reward", "eval_reward"),
    "log_completions": SWITCHES,
    "log_unique_prompts": SWITCHES,
    "num_completions_to_print": COUNTS,
    "log_format": choice("line", "dict"),
    # generation
    "max_completion_length": COUNTS,
    "num_generations": COUNTS,
    "num_generations_eval": COUNTS,
    "generation_batch_size": COUNTS,
    "temperature": NUMBERS,
    "top_p": NUMBERS,
    "top_k": COUNTS,
    "min_p": NUMBERS,
    "repetition_penalty": NUMBERS,
    "generation_kwargs": choice(
        None, {"num_beams": 2}, {"eos_token_id": 5}, {"do_sample": True}, {"nothing": 1}, "{}"
    ),
    "chat_template_kwargs": choice(None, {"a": 1}, '{"a": 1}', "{"),
    "cache_implementation": choice(None, "static", "dynamic"),
    "use_cache": SWITCHES,
    # rewards and data
    "reward_weights": choice(None, [1.0], [1.0, 2.0], ["x"], [math.nan], 1.0),
    "multi_objective_aggregation": choice("sum_then_normalize", "normalize_then_sum"),
    "generation_reward": choice("mean", "max", "pass@2", "pass@0", "majority"),
    "mask_truncated_completions": SWITCHES,
    "reward_timeout": NUMBERS,
    "reward_retry_on": choice(None, ["OSError"], ["nothing"], "OSError"),
    "reward_retries": COUNTS,
    "shuffle_dataset": SWITCHES,
    "remove_unused_columns": SWITCHES,
    "model_init_kwargs": choice(
        None, {"dtype": "float32"}, {"dtype": "bfloat16"}, {"dtype": "float33"}, '{"dtype": "auto"}'
    ),
    "dataloader_drop_last": SWITCHES,
    "train_sampling_strategy": choice("random", "sequential", "group_by_length"),
    # which need what is not here
    "use_vllm": SWITCHES,
    "vllm_mode": choice("colocate", "server"),
    "auto_find_batch_size": SWITCHES,
    "fsdp": choice("full_shard"),
}


def some(values: dict[str, list[Any]], most: int) -> st.SearchStrategy[dict[str, Any]]:
    """A few fields, each with one of its values."""
    names = st.lists(st.sampled_from(sorted(values)), min_size=1, max_size=most, unique=True)
    return names.flatmap(lambda names: st.fixed_dictionaries({name: st.sampled_from(values[name]) for name in names}))


def is_sound(name: str, value: Any) -> bool:
    try:
        ESConfig("run", **{**TINY_RUN, name: value})
    except (ValueError, TypeError, ImportError):
        return False
    return True


@functools.cache
def sound(name: str) -> list[Any]:
    return [value for value in VALUES[name] if is_sound(name, value)]


OPTIONS = st.one_of(
    some(VALUES, 4),
    # What is valid by itself, which may not go together
    st.deferred(lambda: some({name: kept for name in VALUES if (kept := sound(name))}, 8)),
)
FIELDS = {item.name for item in fields(ESConfig)}
DATA = Dataset.from_dict({"prompt": [f"Say {word}" for word in "one two three four".split()]})


def names_a_field(message: str) -> bool:
    return bool(FIELDS & set(re.findall(r"\w+", message)))


def check(model: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """That a step runs, or that there is one error, before the model is loaded, that names a field."""
    loaded = []
    load = trainer.load
    with tempfile.TemporaryDirectory() as folder, monkeypatch.context() as patch:
        patch.setattr(trainer, "load", lambda *args: (loaded.append(1), load(*args))[1])
        run = {**TINY_RUN, "max_steps": 1, "max_completion_length": 3, "per_device_train_batch_size": 2}
        try:
            args = ESConfig(folder, **{**run, **options})
            made = ESTrainer(model, letters, args, DATA, DATA)
        except (ValueError, TypeError, ImportError) as error:
            note(f"{type(error).__name__}: {error}")
            assert not loaded, "the model was loaded for nothing"
            assert names_a_field(str(error)), "the message names no field"
            return
        try:
            made.train()
        except FloatingPointError as error:  # such as of weight_decay=1e30
            assert "Training has diverged. Lower `learning_rate`" in str(error)
        else:
            assert made.state.global_step >= 1


@given(options=OPTIONS)
@example(options={"save_strategy": "best"})
@example(options={"save_strategy": "nonsense"})
@example(options={"cache_implementation": ""})
@example(options={"generation_kwargs": "nonsense"})
@example(options={"logging_steps": math.inf})
@example(options={"metric_for_best_model": []})
@example(options={"weight_decay": True})
@example(options={"weight_decay": 1e30})
@FAST
def test_a_config_runs_or_is_refused(model_folder, options):
    with pytest.MonkeyPatch.context() as patch:
        check(model_folder, options, patch)


@pytest.mark.slow
@given(options=OPTIONS)
@MANY
def test_many_configs_run_or_are_refused(model_folder, options):
    with pytest.MonkeyPatch.context() as patch:
        check(model_folder, options, patch)


def parsed(text: str, folder: Path) -> ESConfig:
    """The config of a YAML file."""
    file = folder / "run.yaml"
    file.write_text(text)
    own = ["--config", str(file), "--output_dir", str(folder / "run"), "--use_cpu", "true"]
    return make_parser("es-trainer train").parse_args_and_config(own)[1]


def plain(options: dict[str, Any]) -> dict[str, Any]:
    """As YAML has it: an option without a value is `None`, which argparse knows as a default only."""
    return yaml.safe_load(yaml.dump(options))


def check_yaml(options: dict[str, Any], capsys: pytest.CaptureFixture) -> None:
    """That a YAML file means what its options mean in Python, or is refused by a message that names a field."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            expected = ESConfig(f"{folder}/run", **{"use_cpu": True, **plain(options)})
        except (ValueError, TypeError, ImportError):
            expected = None
        try:
            config = parsed(yaml.dump(options), Path(folder))
        except SystemExit as error:
            assert error.code == 2
            message = capsys.readouterr().err
            assert names_a_field(message), message
        except (ValueError, TypeError, ImportError) as error:
            assert names_a_field(str(error)), error
        else:
            assert expected is None or config.to_dict() == expected.to_dict()


@given(options=OPTIONS)
@settings(FAST, suppress_health_check=list(HealthCheck))
def test_a_yaml_file_is_read_or_refused(capsys, options):
    check_yaml(options, capsys)


@pytest.mark.slow
@given(options=OPTIONS)
@MANY
def test_many_yaml_files_are_read_or_refused(capsys, options):
    check_yaml(options, capsys)
