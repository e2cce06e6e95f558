import dataclasses
import json
import pickle

import numpy as np
import pytest
import torch
import transformers
from accelerate import ParallelismConfig
from transformers import HfArgumentParser, training_args
from trl import GRPOConfig, TrlParser

from es_trainer import ESConfig
from es_trainer import config as config_module
from es_trainer.fields import GRPOFields


def make(tmp_path, **options) -> ESConfig:
    return ESConfig(str(tmp_path), **{"use_cpu": True, **options})


def test_defaults_are_the_papers(tmp_path):
    config = make(tmp_path)
    assert (config.population_size, config.sigma, config.learning_rate) == (30, 1e-3, 5e-4)
    assert (config.temperature, config.num_generations, config.fitness_shaping) == (0.0, 1, "z_score")
    assert config.lr_scheduler_type == "constant"


def test_defaults_of_a_run(tmp_path):
    config = make(tmp_path)
    assert (config.logging_steps, config.save_steps, config.per_device_eval_batch_size) == (1, 50, 64)
    assert config.num_prompts_per_step == 8


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"eval_steps": 20}, 60),  # a checkpoint has to have an evaluation
        ({"eval_steps": 80}, 80),
        ({"eval_steps": 25}, 50),
        ({"eval_steps": 0.1}, 0.1),
        ({}, 50),  # evaluations are as frequent as logs
        ({"eval_steps": 20, "save_steps": 40}, 40),
    ],
)
def test_checkpoints_of_the_best_model_come_with_evaluations(tmp_path, options, steps):
    config = make(tmp_path, load_best_model_at_end=True, eval_strategy="steps", **options)
    assert config.save_steps == steps


@pytest.mark.parametrize(("capability", "has_it"), [("AVX512", True), ("AVX2", False), ("DEFAULT", False)])
def test_bf16_where_the_cpu_has_it(tmp_path, monkeypatch, caplog, capability, has_it):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    transformers.utils.logging.warning_once.cache_clear()
    configs = [ESConfig(str(tmp_path)), ESConfig(str(tmp_path), use_cpu=True)]  # the same thing on such a machine
    assert [(config.bf16, config.use_cpu) for config in configs] == [(has_it, True)] * 2
    assert caplog.text.count("This CPU has no fast bfloat16") == (0 if has_it else 1)
    assert ESConfig(str(tmp_path), bf16=True).bf16 and not ESConfig(str(tmp_path), fp16=True).bf16


@pytest.mark.parametrize("has_it", [True, False])
def test_bf16_where_another_accelerator_has_it(tmp_path, monkeypatch, has_it):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    for module in (config_module, training_args):
        monkeypatch.setattr(module, "is_torch_bf16_gpu_available", lambda: has_it)
    config = ESConfig(str(tmp_path))
    assert (config.bf16, config.use_cpu) == (has_it, False)


@pytest.mark.parametrize("has_it", [True, False])
def test_bf16_where_the_gpu_has_it_without_emulation(monkeypatch, caplog, has_it):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or has_it
    )
    transformers.utils.logging.warning_once.cache_clear()
    assert config_module.device_has_bf16(use_cpu=False) == has_it
    assert ("This device has no fast bfloat16" in caplog.text) != has_it


def test_bf16_where_servers_generate(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")  # the trainer has no weights
    assert make(tmp_path, use_vllm=True, vllm_mode="server").bf16
    assert not make(tmp_path, use_vllm=True).bf16


# Where they mean something else for ES, the docstring says so
OWN_DEFAULTS = {
    *("num_generations", "temperature", "generation_batch_size", "learning_rate", "logging_steps", "save_steps"),
    *("per_device_train_batch_size", "per_device_eval_batch_size", "lr_scheduler_type"),
}


def test_shared_fields_have_grpos_defaults(tmp_path):
    shared = set(ESConfig.__dataclass_fields__) & set(GRPOConfig.__dataclass_fields__)
    own = {name for name in shared if name in vars(ESConfig).get("__annotations__", {})} - OWN_DEFAULTS
    assert {"max_completion_length", "top_p", "bf16", "reward_weights", "model_init_kwargs"} <= own
    for name in own:
        if name != "use_cache":
            mine, theirs = ESConfig.__dataclass_fields__[name], GRPOConfig.__dataclass_fields__[name]
            older = {"max_completion_length": 256}  # in TRL 1.0
            assert theirs.default in (mine.default, older.get(name)), name


def test_prompts_per_step(tmp_path):
    config = make(tmp_path, per_device_train_batch_size=3, gradient_accumulation_steps=4)
    assert config.num_prompts_per_step == config.per_device_train_batch_size == 12
    assert config.gradient_accumulation_steps == 1
    assert make(tmp_path, num_prompts_per_step=5).per_device_train_batch_size == 5
    assert make(tmp_path, num_prompts_per_step=6, gradient_accumulation_steps=2, per_device_train_batch_size=3)


@pytest.mark.parametrize(
    "batch",
    [{"per_device_train_batch_size": 8}, {"gradient_accumulation_steps": 2}, {"per_device_train_batch_size": 2}],
)
def test_a_step_has_one_number_of_prompts(tmp_path, caplog, batch):
    (said,) = [f"{name}={value} (a step takes num_prompts_per_step=5)" for name, value in batch.items()]
    given = make(tmp_path, num_prompts_per_step=5)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"output_dir: {tmp_path}\nuse_cpu: true\nnum_prompts_per_step: 5\n")
    options = [f"--{name}={value}" for name, value in batch.items()]
    for make_it in (
        lambda: make(tmp_path, num_prompts_per_step=5, **batch),
        lambda: dataclasses.replace(given, **batch),
        lambda: TrlParser(ESConfig).parse_args_and_config(["--config", str(recipe), *options])[0],
    ):
        caplog.clear()
        assert make_it().num_prompts_per_step == 5
        assert said in caplog.text


def test_copies_with_changes(tmp_path):
    config = make(tmp_path)
    assert dataclasses.replace(config, per_device_train_batch_size=3).num_prompts_per_step == 3
    assert dataclasses.replace(config, gradient_accumulation_steps=3).num_prompts_per_step == 24
    assert dataclasses.replace(config, num_prompts_per_step=3).per_device_train_batch_size == 3
    given = dataclasses.replace(config, num_prompts_per_step=3)
    assert dataclasses.replace(given, num_prompts_per_step=4).num_prompts_per_step == 4
    assert dataclasses.replace(config, seed=7).data_seed == 7
    assert dataclasses.replace(make(tmp_path, data_seed=3), seed=7).data_seed == 3


def test_a_config_survives_a_round_trip(tmp_path):
    config = make(tmp_path, gradient_accumulation_steps=2, generation_kwargs={"min_new_tokens": 2})
    again = ESConfig(**{k: v for k, v in config.to_dict().items() if ESConfig.__dataclass_fields__[k].init})
    assert again.to_dict() == config.to_dict()
    assert pickle.loads(pickle.dumps(config)).to_dict() == config.to_dict()
    assert json.loads(config.to_json_string())["num_prompts_per_step"] == 16
    assert config.to_sanitized_dict()["num_prompts_per_step"] == 16


def test_a_copy_says_what_its_original_has_not(tmp_path, caplog):
    # An `epsilon` of 0.123 and a rank of 17 are in no other test
    config = make(tmp_path, epsilon=0.123, perturbation_rank=17, learning_rate=2e-6)
    assert caplog.text.count("epsilon=0.123") == caplog.text.count("perturbation_rank=17") == 1
    caplog.clear()
    ESConfig(**config.to_dict())
    pickle.loads(pickle.dumps(config))
    assert dataclasses.replace(config, perturbation="low_rank").perturbation_rank == 17
    assert caplog.text == ""
    dataclasses.replace(config, max_grad_norm=0.123)
    assert "max_grad_norm=0.123 (there are no gradients)" in caplog.text
    assert "perturbation_rank" not in caplog.text


def test_it_parses_from_the_command_line(tmp_path):
    arguments = [
        "--output_dir",
        str(tmp_path),
        "--use_cpu",
        "--sigma",
        "0.01",
        "--antithetic",
        "--reward_weights",
        "1",
        "2",
    ]
    arguments += ["--generation_kwargs", '{"min_new_tokens": 3}', "--population_size", "4"]
    for parser in (HfArgumentParser(ESConfig), TrlParser(ESConfig)):
        (config,) = parser.parse_args_into_dataclasses(arguments)
        assert (config.sigma, config.antithetic, config.reward_weights) == (0.01, True, [1.0, 2.0])
        assert config.generation_kwargs == {"min_new_tokens": 3}
    HfArgumentParser(ESConfig).format_help()


def test_every_field_of_its_own_is_documented():
    own = vars(ESConfig)["__annotations__"]
    missing = [
        name for name in own if f"{name} (`" not in ESConfig.__doc__ and f"`{name}`: Defaults" not in ESConfig.__doc__
    ]
    assert missing == ["_VALID_DICT_FIELDS"] or missing == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"population_size": 1}, "population_size=1"),
        ({"population_size": 5, "antithetic": True}, "population_size=5.*even"),
        ({"sigma": 0.0}, "sigma=0.0"),
        ({"sigma": -1e-3}, "sigma=-0.001"),
        ({"sigma": float("nan")}, "sigma=nan"),
        ({"learning_rate": -1.0}, "learning_rate=-1.0"),
        ({"weight_decay": -1.0}, "weight_decay=-1.0"),
        ({"anchor_decay": -1.0}, "anchor_decay=-1.0"),
        ({"perturbation": "x"}, "perturbation='x'.*'gaussian', 'low_rank'"),
        ({"perturbation_rank": 0}, "perturbation_rank=0"),
        ({"population_batch_size": 0}, "population_batch_size=0"),
        ({"fitness_shaping": "rank"}, "fitness_shaping='rank'.*'centered_rank'"),
        ({"master_weights": "cpu"}, "master_weights='cpu'.*'host'"),
        ({"es_optimizer": "adamw"}, "es_optimizer='adamw'.*'adam'"),
        ({"num_prompts_per_step": 0}, "num_prompts_per_step=0"),
        ({"max_completion_length": None}, "max_completion_length=None"),
        ({"max_completion_length": 0}, "max_completion_length=0"),
        ({"num_generations": 0}, "num_generations=0"),
        ({"generation_kwargs": {"temperature": -1.0}}, "temperature=-1.0"),
        ({"generation_kwargs": {"top_p": 2.0}}, "top_p=2.0"),
        ({"generation_batch_size": 0}, "generation_batch_size=0"),
        ({"temperature": -0.5}, "temperature=-0.5"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"top_p": 1.5}, "top_p=1.5"),
        ({"top_k": -1}, "top_k=-1"),
        ({"min_p": 2.0}, "min_p=2.0"),
        ({"repetition_penalty": 0.0}, "repetition_penalty=0.0"),
        ({"num_completions_to_print": 0}, "num_completions_to_print=0"),
        ({"auto_find_batch_size": True}, "auto_find_batch_size=True"),
        ({"parallelism_config": ParallelismConfig(tp_size=2)}, "(?s)parallelism_config=.*zero3.yaml"),
        ({"train_sampling_strategy": "batch_rebalance"}, "train_sampling_strategy='batch_rebalance'.*'sequential'"),
        ({"model_init_kwargs": {"torch_dtype": "float16", "dtype": "bfloat16"}}, "'torch_dtype'.*Leave"),
        ({"bf16": True, "fp16": True}, "fp16 and bf16"),
    ],
)
def test_what_cannot_work_is_refused_by_name(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        make(tmp_path, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"generation_kwargs": {"do_sample": False}, "temperature": 0.7}, "'do_sample'.*temperature"),
        ({"generation_kwargs": {"typical_p": 0.9}}, "'typical_p'.*top_p"),
        ({"generation_kwargs": {"num_return_sequences": 2}}, "'num_return_sequences'.*num_generations"),
        ({"generation_kwargs": {"supress_tokens": [1]}}, "'supress_tokens'.*did you mean 'suppress_tokens'"),
        ({"generation_kwargs": {"num_beams": 2}, "temperature": 1.0}, "num_beams"),
        ({"generation_kwargs": {"num_beams": 2}, "population_batch_size": 3}, "num_beams.*population_batch_size=1"),
        ({"generation_kwargs": {"num_beams": 2}, "perturbation": "low_rank"}, "num_beams.*perturbation='gaussian'"),
    ],
)
def test_what_generation_cannot_do_is_refused_before_a_model_is_loaded(trainer, options, message):
    with pytest.raises(ValueError, match=message):
        trainer(model="a-name/that-no-model-has", **options)


# ---- what has no effect ----


@pytest.fixture
def left_out(tmp_path, caplog):
    """The warning about options, and the config."""

    def make_config(**options):
        config = make(tmp_path, **options)
        (record,) = [record for record in caplog.records if "are left out" in record.getMessage()]
        return record.getMessage(), config

    return make_config


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"optim": "adamw_torch"}, "optim='adamw_torch' (`es_optimizer` is the update rule)"),
        ({"max_grad_norm": 0.5}, "max_grad_norm=0.5 (there are no gradients)"),
        ({"gradient_checkpointing": True}, "gradient_checkpointing=True (there are no gradients)"),
        ({"torch_compile": True}, "torch_compile=True (nothing is compiled"),
        ({"neftune_noise_alpha": 5.0}, "neftune_noise_alpha=5.0 (the members' noise is `sigma`)"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor=0.1 (there are no labels)"),
        ({"use_liger_kernel": True}, "use_liger_kernel=True (a module with Liger's kernels"),
        ({"bf16_full_eval": True}, "bf16_full_eval=True (evaluations have the dtype of training"),
        ({"fp16_full_eval": True}, "fp16_full_eval=True (evaluations have the dtype of training"),
        ({"include_num_input_tokens_seen": True}, "include_num_input_tokens_seen=True (`num_tokens` is logged)"),
    ],
)
def test_what_has_no_effect_is_named_and_reset(left_out, options, said):
    message, config = left_out(**options)
    assert said in message
    ((name, value),) = options.items()
    assert getattr(config, name) in (ESConfig.__dataclass_fields__[name].default, None, False)


@pytest.mark.parametrize(
    ("options", "said", "others"),
    [
        ({"perturbation_rank": 2}, "(needs perturbation='low_rank')", {"perturbation": "low_rank"}),
        ({"adam_beta1": 0.5}, "(needs es_optimizer='adam' or 'momentum')", {"es_optimizer": "momentum"}),
        ({"adam_beta2": 0.5}, "(needs es_optimizer='adam')", {"es_optimizer": "adam"}),
        (
            {"train_sampling_strategy": "group_by_length", "shuffle_dataset": False},
            "train_sampling_strategy='group_by_length' (needs shuffle_dataset=True)",
            {"shuffle_dataset": True},
        ),
        ({"warmup_steps": 5}, "'constant_with_warmup'", {"lr_scheduler_type": "linear"}),
        ({"top_p": 0.5}, "(needs temperature > 0)", {"temperature": 0.7}),
        ({"top_k": 5}, "(needs temperature > 0)", {"generation_kwargs": {"temperature": 0.7}}),
        ({"vllm_max_model_length": 99}, "vllm_mode='colocate'", {"use_vllm": True}),
        ({"vllm_server_port": 99}, "without vllm_server_base_url", {"use_vllm": True, "vllm_mode": "server"}),
        ({"num_completions_to_print": 2}, "(needs log_completions=True)", {"log_completions": True}),
        ({"eval_steps": 2}, "(needs eval_strategy='steps')", {"eval_strategy": "steps"}),
        ({"anchor_penalty": "l1"}, "(needs anchor_decay > 0)", {"anchor_decay": 0.1}),
        ({"anchor_weights": "host"}, "(needs anchor_decay > 0)", {"anchor_decay": 0.1}),
        ({"sigma_min_ratio": 0.5}, "(needs sigma_schedule='linear' or 'cosine')", {"sigma_schedule": "cosine"}),
        (
            {"generation_reward": "max"},
            "(needs num_generations > 1)",
            {"num_generations": 2, "temperature": 1.0},
        ),
        ({"save_steps": 2, "save_strategy": "epoch"}, "(needs save_strategy='steps')", {"save_strategy": "steps"}),
        ({"ds3_gather_for_generation": False}, "(needs DeepSpeed ZeRO-3)", None),
    ],
)
def test_what_needs_other_settings_is_named_and_kept(tmp_path, left_out, caplog, options, said, others):
    message, config = left_out(**options)
    name = next(iter(options))
    assert f"{name}={options[name]!r} " in message and said in message
    assert getattr(config, name) == options[name]
    if others is not None:
        caplog.clear()
        make(tmp_path, **{**options, **others})
        assert name not in caplog.text


def test_of_accelerates_options_only_the_sampler_has_an_effect(left_out):
    message, config = left_out(accelerator_config={"split_batches": True, "use_seedable_sampler": False})
    assert "accelerator_config.split_batches=True" in message and "seedable" not in message
    assert (config.accelerator_config.split_batches, config.accelerator_config.use_seedable_sampler) == (False, False)


@pytest.mark.parametrize("name", ["num_generations", "num_generations_eval"])
def test_greedy_completions_would_be_equal(tmp_path, left_out, name):
    message, config = left_out(**{name: 4})
    assert f"{name}=4 (greedy completions would be equal, so 1 is taken; set temperature > 0 for more)" in message
    assert getattr(config, name) == 1
    assert getattr(make(tmp_path, temperature=0.7, **{name: 4}), name) == 4
    assert getattr(make(tmp_path, generation_kwargs={"temperature": 0.7}, **{name: 4}), name) == 4


def test_a_learning_rate_of_grpo(tmp_path, caplog):
    assert make(tmp_path, learning_rate=1e-6).learning_rate == 1e-6
    assert "learning_rate=1e-06 is one of GRPO's" in caplog.text
    caplog.clear()
    make(tmp_path, learning_rate=1e-5), make(tmp_path, learning_rate=0.0)
    assert caplog.text == ""


def test_nothing_to_say_of_the_defaults(tmp_path, caplog):
    make(tmp_path, bf16=False)
    theirs = {item.name: item.default for item in dataclasses.fields(GRPOFields)}
    make(tmp_path, bf16=False, **{name: theirs[name] for name in theirs if name not in OWN_DEFAULTS})
    assert caplog.text == ""


# ---- generation_kwargs ----


@pytest.mark.parametrize(
    ("given", "options"),
    [
        ({"do_sample": True, "top_k": 5}, {"temperature": 0.7}),
        ({"do_sample": True, "temperature": 0.7}, {}),
        ({"do_sample": False}, {}),
        ({"num_return_sequences": 1}, {}),
        ({"num_return_sequences": 3}, {"num_generations": 3, "temperature": 1.0}),
        ({"typical_p": 1.0, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0}, {}),
        ({"n": 1, "max_tokens": 64}, {"use_vllm": True, "max_completion_length": 64}),
    ],
)
def test_what_agrees_with_other_fields_is_harmless(tmp_path, caplog, given, options):
    config = make(tmp_path, bf16=False, generation_kwargs=given, **options)
    left = {key: value for key, value in given.items() if key in ("top_k", "temperature")}
    assert config.generation_kwargs == (left or None)
    assert caplog.text == ""


def test_do_sample_does_not_turn_sampling_on(left_out):
    message, config = left_out(generation_kwargs={"do_sample": True, "min_new_tokens": 2})
    assert "generation_kwargs['do_sample']=True (temperature=0.0 is greedy; set temperature > 0)" in message
    assert (config.generation_kwargs, config.temperature) == ({"min_new_tokens": 2}, 0.0)


def test_other_ways_to_write_the_same(tmp_path):
    assert make(tmp_path, top_k=None).top_k == 0
    options = {"torch_dtype": "bfloat16", "revision": "x"}
    assert make(tmp_path, model_init_kwargs=options).model_init_kwargs == {"dtype": "bfloat16", "revision": "x"}
    assert options == {"torch_dtype": "bfloat16", "revision": "x"}  # the caller's own is left alone


# ---- types ----


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"sigma": "1e-3"}, 1e-3),
        ({"learning_rate": "2e-2"}, 0.02),
        ({"population_size": 4.0}, 4),
        ({"population_size": "4"}, 4),
        ({"population_size": np.int64(4)}, 4),
        ({"sigma": np.float64(0.05)}, 0.05),
        ({"seed": "12345678901234567"}, 12345678901234567),
        ({"antithetic": np.bool_(True)}, True),
        ({"antithetic": "true"}, True),
        ({"reward_weights": np.array([2.0, 1.0])}, [2.0, 1.0]),
        ({"reward_weights": (1, "2")}, [1, 2]),
        ({"generation_kwargs": {"min_new_tokens": np.int64(2)}}, {"min_new_tokens": 2}),
        ({"generation_kwargs": {"suppress_tokens": torch.tensor([1, 2])}}, {"suppress_tokens": [1, 2]}),
    ],
)
def test_numbers_are_what_they_are(tmp_path, options, wanted):
    ((name, _),) = options.items()
    value = getattr(make(tmp_path, **options), name)
    assert value == wanted and json.loads(json.dumps(value)) == wanted
    assert type(value) is type(wanted)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sigma": "small"}, "`sigma='small'` is not valid: it must be a number"),
        ({"sigma": None}, "`sigma=None` is not valid: it must be a number"),
        ({"population_size": 4.5}, "`population_size=4.5` is not valid: it must be an integer"),
        ({"population_size": "many"}, "`population_size='many'` is not valid: it must be an integer"),
        ({"population_size": [4]}, r"`population_size=\[4\]` is not valid: it must be an integer"),
        ({"antithetic": "maybe"}, "`antithetic='maybe'` is not valid: it must be True or False"),
        ({"antithetic": 2}, "`antithetic=2` is not valid: it must be True or False"),
        ({"reward_weights": 2.0}, "`reward_weights=2.0` is not valid: give a list"),
        ({"reward_weights": ["a"]}, "`reward_weights='a'` is not valid: it must be a number"),
        ({"generation_kwargs": {"suppress_tokens": {1}}}, "`generation_kwargs=.*cannot be written into the history"),
        ({"chat_template_kwargs": {"date": print}}, "`chat_template_kwargs=.*cannot be written into the history"),
    ],
)
def test_what_is_no_number_or_cannot_be_written_is_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        make(tmp_path, **options)


def test_tools_of_a_chat_template_are_their_schemas(tmp_path):
    def add(a: int, b: int) -> int:
        """
        Add two numbers.

        Args:
            a: The first.
            b: The second.
        """
        return a + b

    options = make(tmp_path, chat_template_kwargs={"tools": [add, {"name": "other"}]}).chat_template_kwargs
    assert options == {"tools": [transformers.utils.get_json_schema(add), {"name": "other"}]}


def test_beam_search_goes_with_one_member_at_a_time(tmp_path):
    # With `do_sample`, it is what a script for GRPO has whose temperature was left alone
    for options in ({"num_beams": 2}, {"do_sample": True, "num_beams": 2, "length_penalty": -0.1}):
        assert make(tmp_path, generation_kwargs=options).population_batch_size == 1
    assert make(tmp_path, generation_kwargs={"num_beams": 1}).population_batch_size is None


def test_perturbations_parse_from_the_command_line(tmp_path):
    arguments = ["--output_dir", str(tmp_path), "--use_cpu", "--perturbation", "low_rank"]
    (config,) = HfArgumentParser(ESConfig).parse_args_into_dataclasses(
        [*arguments, "--perturbation_rank", "4", "--population_batch_size", "8"]
    )
    assert (config.perturbation, config.perturbation_rank, config.population_batch_size) == ("low_rank", 4, 8)
    assert make(tmp_path).population_batch_size is None


# ---- several processes ----


def test_processes_that_take_themselves_for_one_are_told_so(tmp_path, monkeypatch):
    launched = iter([1, 2, 2])  # Accelerate is made to overlook them, as it did without a backend
    monkeypatch.setattr(config_module, "launched_processes", lambda: next(launched))
    with pytest.raises(ValueError, match="started 2 processes, but Accelerate takes each of them for a run of 1"):
        make(tmp_path)


def test_fsdp_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="FSDP is not supported.*zero3.yaml"):
        make(tmp_path)


def test_consistency_checks_need_a_number_of_steps(tmp_path):
    assert make(tmp_path).consistency_check_steps == 50
    with pytest.raises(ValueError, match="`consistency_check_steps=0` is not valid"):
        make(tmp_path, consistency_check_steps=0)
