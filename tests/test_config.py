import pytest
from transformers import HfArgumentParser
from trl import GRPOConfig, TrlParser

from es_trainer import ESConfig
from es_trainer import config as config_module


def make(tmp_path, **options) -> ESConfig:
    return ESConfig(str(tmp_path), **{"use_cpu": True, **options})


def test_defaults_are_the_papers(tmp_path):
    config = make(tmp_path)
    assert (config.population_size, config.sigma, config.learning_rate) == (30, 1e-3, 5e-4)
    assert (config.temperature, config.num_generations, config.fitness_shaping) == (0.0, 1, "z_score")
    assert config.bf16 and not make(tmp_path, fp16=True).bf16


# Where they mean something else for ES, the docstring says so
OWN_DEFAULTS = {"num_generations", "temperature", "generation_batch_size", "learning_rate"}


def test_shared_fields_have_grpos_defaults(tmp_path):
    shared = set(ESConfig.__dataclass_fields__) & set(GRPOConfig.__dataclass_fields__)
    own = {name for name in shared if name in vars(ESConfig).get("__annotations__", {})} - OWN_DEFAULTS
    assert {"max_completion_length", "top_p", "bf16", "reward_weights", "model_init_kwargs"} <= own
    for name in own:
        if name != "use_cache":
            mine, theirs = ESConfig.__dataclass_fields__[name], GRPOConfig.__dataclass_fields__[name]
            assert mine.default == theirs.default, name


def test_prompts_per_step(tmp_path):
    config = make(tmp_path, per_device_train_batch_size=3, gradient_accumulation_steps=4)
    assert config.num_prompts_per_step == config.per_device_train_batch_size == 12
    assert config.gradient_accumulation_steps == 1
    assert make(tmp_path, num_prompts_per_step=5).per_device_train_batch_size == 5


def test_a_config_survives_a_round_trip(tmp_path):
    config = make(tmp_path, gradient_accumulation_steps=2, generation_kwargs={"min_new_tokens": 2})
    again = ESConfig(**{k: v for k, v in config.to_dict().items() if ESConfig.__dataclass_fields__[k].init})
    assert again.to_dict() == config.to_dict()


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
        ({"num_generations": 4}, "num_generations=4.*temperature > 0"),
        ({"generation_batch_size": 0}, "generation_batch_size=0"),
        ({"temperature": -0.5}, "temperature=-0.5"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"top_p": 1.5}, "top_p=1.5"),
        ({"top_k": -1}, "top_k=-1"),
        ({"min_p": 2.0}, "min_p=2.0"),
        ({"repetition_penalty": 0.0}, "repetition_penalty=0.0"),
        ({"num_completions_to_print": 0}, "num_completions_to_print=0"),
        ({"auto_find_batch_size": True}, "auto_find_batch_size=True"),
        ({"generation_kwargs": {"do_sample": True}}, "'do_sample'.*temperature"),
        ({"generation_kwargs": {"num_return_sequences": 2}}, "'num_return_sequences'.*num_generations"),
        ({"generation_kwargs": {"supress_tokens": [1]}}, "'supress_tokens'.*did you mean 'suppress_tokens'"),
        ({"generation_kwargs": {"num_beams": 2}, "temperature": 1.0}, "num_beams"),
        ({"generation_kwargs": {"num_beams": 2}}, "num_beams.*population_batch_size=1"),
        ({"generation_kwargs": {"num_beams": 2}, "population_batch_size": 3}, "num_beams.*population_batch_size=1"),
        (
            {"generation_kwargs": {"num_beams": 2}, "population_batch_size": 1, "perturbation": "low_rank"},
            "num_beams.*perturbation='gaussian'",
        ),
        ({"bf16": True, "fp16": True}, "fp16 and bf16"),
    ],
)
def test_what_cannot_work_is_refused_by_name(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        make(tmp_path, **options)


def test_beam_search_goes_with_one_member_at_a_time(tmp_path):
    assert make(tmp_path, generation_kwargs={"num_beams": 2}, population_batch_size=1).perturbation == "gaussian"


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
