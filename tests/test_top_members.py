"""The best members of a run's last population, as LoRA adapters of the model before its last update."""

import pytest
import torch
from conftest import make_model, weights
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, MixtralConfig, MixtralForCausalLM

from es_trainer import replay, replay_top_members
from es_trainer.evolution import Member
from es_trainer.run.history import begin_replay, read_history, replay_step
from es_trainer.run.history_file import History
from es_trainer.run.top_members import best_members, member_folders


SIGMA = 0.03  # of the last update, not that of the config
REWARDS = [None, 0.5, 2.0, 0.5]  # of its members
BEST = (2, 1)


def make_gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=259, n_positions=256, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2)
    )


MODELS = {
    "tied": make_model,
    "untied": lambda: make_model(tie=False),
    "with biases": lambda: make_model(attention_bias=True, mlp_bias=True),
    "with transposed weights": make_gpt2,
}


def last_population(run, folder) -> list[Member]:
    """Train, and let the last line of the history have the sigma and the rewards from above."""
    run.train()
    history = History(folder / "history.jsonl")
    header, lines = history.read()
    lines[-1] |= {"sigma": SIGMA, "rewards": REWARDS}
    history.write(header, lines)
    return [Member(seed, sign) for seed, sign in zip(lines[-1]["seeds"], lines[-1]["signs"], strict=True)]


def perturbed(model, folder, member: Member):
    """The model with the weights of a member of the second update."""
    header, lines = read_history(folder)
    model, optimizer = begin_replay(model, folder, header)
    replay_step(optimizer, lines[0])
    optimizer.sigma = SIGMA
    optimizer.perturb(member)
    return model.eval()


def effective(model: PeftModel) -> dict[str, torch.Tensor]:
    """The weights that a model computes with, under the names that they have without an adapter."""
    found = {}
    for name, module in model.get_base_model().named_modules():
        if isinstance(module, LoraLayer):
            found[f"{name}.weight"] = module.base_layer.weight + module.get_delta_weight("default")
            if getattr(module.base_layer, "bias", None) is not None:
                found[f"{name}.bias"] = module.base_layer.bias
        elif hasattr(module, "modules_to_save"):
            saved = module.modules_to_save["default"].named_parameters()
            found |= {f"{name}.{key}": parameter for key, parameter in saved}
    return found


@pytest.fixture
def low_rank(trainer):
    def make(model, **options):
        return trainer(
            model, perturbation="low_rank", perturbation_rank=2, antithetic=True, **{"max_steps": 2, **options}
        )

    return make


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_weights_and_outputs_are_those_of_the_perturbed_model(make, low_rank, tmp_path):
    members = last_population(low_rank(make()), tmp_path / "run")
    assert [members[i].sign for i in BEST] == [1, -1]
    center = replay_top_members(make(), tmp_path / "run", 2, tmp_path / "out")
    for name, value in weights(replay(make(), tmp_path / "run", steps=1)).items():
        assert torch.equal(center.get_parameter(name), value)

    ids = torch.arange(3, 40)[None]
    for folder, number in zip(member_folders(tmp_path / "out"), BEST, strict=True):
        reference = perturbed(make(), tmp_path / "run", members[number])
        saved_center = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        assert not torch.allclose(saved_center(ids).logits, reference(ids).logits, atol=1e-2)
        adapted = PeftModel.from_pretrained(saved_center, folder).eval()
        found, expected = effective(adapted), dict(reference.named_parameters(remove_duplicate=False))
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-6, msg=name)
        by_name = AutoModelForCausalLM.from_pretrained(folder).eval()
        for model in (adapted, by_name):
            torch.testing.assert_close(model(ids).logits, reference(ids).logits, rtol=1e-4, atol=1e-4)


def test_vectors_of_a_model_in_16_bits_are_rounded_as_in_the_run(low_rank, tmp_path):
    # To nearest, a norm's weight of 1 would swallow most of the noise
    members = last_population(low_rank(make_model(dtype=torch.bfloat16)), tmp_path / "run")
    replay_top_members(make_model(dtype=torch.bfloat16), tmp_path / "run", 1, tmp_path / "out")
    reference = perturbed(make_model(dtype=torch.bfloat16), tmp_path / "run", members[BEST[0]])
    saved = load_file(tmp_path / "out" / "member-1" / "adapter_model.safetensors")
    vectors = [name for name, parameter in reference.named_parameters() if parameter.dim() == 1]
    assert len(vectors) == 5
    for name in vectors:
        assert torch.equal(saved[f"base_model.model.{name}"], reference.get_parameter(name))


def test_frozen_parameters_are_in_no_adapter(low_rank, tmp_path):
    model = make_model(tie=False)
    for frozen in (model.lm_head, model.model.norm):
        frozen.requires_grad_(False)
    last_population(low_rank(model), tmp_path / "run")
    replay_top_members(make_model(tie=False), tmp_path / "run", 1, tmp_path / "out")
    saved = load_file(tmp_path / "out" / "member-1" / "adapter_model.safetensors")
    assert not [name for name in saved if "lm_head" in name or ".model.norm." in name]
    assert len(saved) == 2 * (1 + 2 * 7) + 2 * 2  # of the embedding and each layer's matrices and norms


def test_a_parameter_that_adapters_cannot_carry_is_named(low_rank, tmp_path):
    def make():
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 1, "num_local_experts": 2}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
        return MixtralForCausalLM(MixtralConfig(vocab_size=259, **sizes, **heads, bos_token_id=1, eos_token_id=2))

    last_population(low_rank(make(), max_steps=1), tmp_path / "run")
    with pytest.raises(ValueError, match=r"cannot carry the trained parameter `model.layers.0.mlp.\S+` of shape \["):
        replay_top_members(make(), tmp_path / "run", 1, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ---- which members ----


def line(rewards, **more):
    return {"step": 7, "seeds": [10, 10, 11, 12], "signs": [1, -1, 1, 1], "rewards": rewards, **more}


def test_the_best_come_first_and_of_equals_the_first():
    best = best_members(line([1.0, 3.0, None, 1.0]), 3)
    assert best == [Member(10, -1), Member(10, 1), Member(12, 1)]
    assert best_members(line([-1.0, -3.0, -2.0, 0.0]), 2) == [Member(12), Member(10)]


@pytest.mark.parametrize(
    ("header", "lines", "number", "message"),
    [
        ({}, [line([1.0] * 4)], 0, "`top_members=0` is not valid: the population has 4 members; give 1 to that many"),
        ({}, [line([1.0] * 4)], 5, "`top_members=5` is not valid: the population has 4 members"),
        ({}, [line([1.0, None, None, 2.0])], 3, "`top_members=3`: only 2 members of update 7 have a reward"),
        ({}, [], 1, "`top_members=1`: no update of .* is replayed, so there are no members"),
        (
            {"config": {"perturbation": "gaussian"}},
            [line([1.0] * 4)],
            1,
            "had perturbation='gaussian', .* Train with perturbation='low_rank'",
        ),
        # The default of an earlier version's history
        ({"config": {}}, [line([1.0] * 4)], 1, "had perturbation='gaussian'"),
        (
            {"parameters": {"base_model.model.lm_head.lora_A.default.weight": [2, 32]}},
            [line([1.0] * 4)],
            1,
            "trained an adapter, whose members are not LoRA adapters",
        ),
    ],
)
def test_errors_before_the_model_is_loaded(header, lines, number, message, tmp_path):
    header = {"config": {"perturbation": "low_rank"}, "parameters": {"lm_head.weight": [259, 32]}, **header}
    History(tmp_path / "history.jsonl").write(header, lines)
    with pytest.raises(ValueError, match=message):
        replay_top_members("no/such/model", tmp_path, number, tmp_path / "out")


def test_members_are_not_mixed_with_earlier_ones(tmp_path):
    header = {"config": {"perturbation": "low_rank"}, "parameters": {"lm_head.weight": [259, 32]}}
    History(tmp_path / "history.jsonl").write(header, [line([1.0] * 4)])
    (tmp_path / "out" / "member-2").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"`output_dir=.*out'` has members already \(member-2\)"):
        replay_top_members("no/such/model", tmp_path, 1, tmp_path / "out")


def test_folders_of_members_are_in_order_and_complete(tmp_path):
    with pytest.raises(ValueError, match="has no members. Give one that `es-trainer replay --top_members` wrote"):
        member_folders(tmp_path)
    for number in range(1, 12):
        (tmp_path / f"member-{number}").mkdir()
    assert [path.name for path in member_folders(tmp_path)] == [f"member-{number}" for number in range(1, 12)]
    (tmp_path / "member-1").rmdir()
    with pytest.raises(ValueError, match="has the members .*member-2.* with all members"):
        member_folders(tmp_path)
