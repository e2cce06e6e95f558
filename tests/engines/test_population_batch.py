import inspect

import psutil
import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, make_model
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GptOssConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    MixtralConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from es_trainer.engines import PopulationBatch, TransformersEngine, population_batch
from es_trainer.evolution import EvolutionStrategy, Member
from es_trainer.noise import noise
from es_trainer.noise.shapes import Factors, Gaussian, LowRank
from es_trainer.weights.store import Weights


SIGMA = 0.05
MEMBERS = [Member(1), Member(2, -1), Member(3)]
PROMPTS = ["Say one", "Hi", "A much longer prompt than the others", "Three", "x"]
TWO_KINDS = ["sliding_attention", "full_attention"]
CONFIGS = {
    "llama": LlamaConfig(**TINY, tie_word_embeddings=True),
    "llama_biases": LlamaConfig(**TINY, tie_word_embeddings=False, attention_bias=True, mlp_bias=True),
    "mistral": MistralConfig(**TINY, sliding_window=8),
    "qwen2": Qwen2Config(**TINY),
    "qwen3": Qwen3Config(**TINY, head_dim=8),
    "gemma": GemmaConfig(**TINY, head_dim=8),
    "gemma3": Gemma3TextConfig(**TINY, head_dim=8, sliding_window=8, layer_types=TWO_KINDS),
    "phi3": Phi3Config(**TINY),
    "gpt2": GPT2Config(vocab_size=259, n_embd=32, n_layer=2, n_head=4, n_positions=256, initializer_range=0.3),
    "qwen3_moe": Qwen3MoeConfig(**TINY, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16),
    "mixtral": MixtralConfig(**TINY, num_local_experts=4, num_experts_per_tok=2),
}
UNKNOWN = {
    "gpt_oss": GptOssConfig(**TINY, head_dim=8, num_local_experts=4),
    "mamba": MambaConfig(vocab_size=259, hidden_size=32, num_hidden_layers=2, state_size=4),
}
PERTURBATIONS = [LowRank(1), LowRank(4), Gaussian()]


def name(value) -> str | None:
    if isinstance(value, Gaussian):
        return "".join([type(value).__name__, *map(str, vars(value).values())])
    return None


def make(config, dtype=torch.float32):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data += torch.randn_like(parameter) * 0.2
    return model


def evolution(model, perturbation, trained=lambda name: True):
    named = list(model.named_parameters())
    for path, parameter in named:
        parameter.requires_grad_(parameter.requires_grad and trained(path))
    frozen = [parameter for _, parameter in named if not parameter.requires_grad]
    return EvolutionStrategy(
        [(path, parameter) for path, parameter in named if parameter.requires_grad],
        sigma=SIGMA,
        perturbation=perturbation,
        frozen=frozen,
    )


def batch_of(model, perturbation, **options) -> PopulationBatch:
    return PopulationBatch(model, evolution(model, perturbation, **options).weights)


@torch.inference_mode()
def logits_of(model, ids):
    inputs = {}
    if "position_ids" in inspect.signature(model.forward).parameters:
        inputs["position_ids"] = torch.arange(ids.shape[1]).expand_as(ids)
    return model(input_ids=ids, **inputs).logits.float()


def tokens(rows: int) -> torch.Tensor:
    return torch.randint(3, 259, (rows, 11), generator=torch.Generator().manual_seed(rows))


def distance(a, b) -> float:
    return float((a - b).abs().max() / b.abs().max())


def check_logits(model, optimizer, *assignments, tolerance=1e-5, least=0.05):
    """Each row's logits are its member's; those of members are at least so far from one another."""
    batch = PopulationBatch(model, optimizer.weights)
    assert batch.check() is None
    for assignment in assignments:
        ids = tokens(len(assignment))
        with batch.install(MEMBERS, SIGMA) as rows:
            rows.assign(assignment)
            together = logits_of(model, ids)
        alone = []
        for member in MEMBERS:
            optimizer.perturb(member)
            alone.append(logits_of(model, ids))
        optimizer.restore()
        for row, member in enumerate(assignment):
            assert distance(together[row], alone[member][row]) < tolerance
        for one, other in [(0, 1), (1, 2), (2, 0)]:
            assert distance(alone[one], alone[other]) > least


@pytest.mark.parametrize("perturbation", PERTURBATIONS, ids=name)
@pytest.mark.parametrize("architecture", CONFIGS)
def test_each_row_gets_its_members_logits(architecture, perturbation):
    model = make(CONFIGS[architecture])
    check_logits(model, evolution(model, perturbation), [0, 0, 1, 1, 2, 2], [2, 0, 1, 2, 1, 2])


@pytest.mark.parametrize("perturbation", PERTURBATIONS, ids=name)
@pytest.mark.parametrize("architecture", ["llama_biases", "gpt2", "qwen3_moe"])
def test_rows_can_be_of_any_members(architecture, perturbation):
    model = make(CONFIGS[architecture])
    assignments = [[0], [2], [0, 1, 2], [1, 1, 2, 2], [0, 2], [0, 1, 0, 1], [2, 1, 0], [1, 2, 2, 2], [0, 0, 2]]
    check_logits(model, evolution(model, perturbation), *assignments)


@pytest.mark.parametrize("perturbation", [LowRank(1), Gaussian()], ids=name)
@pytest.mark.parametrize("architecture", CONFIGS)
def test_members_complete_prompts_as_each_alone(architecture, perturbation, tokenizer, config):
    model = make(CONFIGS[architecture])
    optimizer = evolution(model, perturbation)
    engine = TransformersEngine(model, tokenizer, config(max_completion_length=8))
    prompts = engine.tokenize(PROMPTS)
    with PopulationBatch(model, optimizer.weights).install(MEMBERS, SIGMA) as rows:
        together = engine.generate(prompts, 0, members=rows)
    engine.drops_finished_rows = False
    alone = []
    for member in MEMBERS:
        optimizer.perturb(member)
        alone.append(engine.generate(prompts, 0))
    assert together == [completion for completions in alone for completion in completions]
    assert len({tuple(completion.text for completion in completions) for completions in alone}) == 3


@pytest.mark.parametrize("architecture", ["llama", "llama_biases", "qwen3", "gpt2"])
@pytest.mark.parametrize("rank", [1, 4])
def test_bfloat16_is_close(architecture, rank):
    model = make(CONFIGS[architecture], dtype=torch.bfloat16)
    optimizer = evolution(model, LowRank(rank))
    check_logits(model, optimizer, [0, 0, 1, 1, 2, 2], [2, 0, 1, 2, 1, 2], tolerance=0.1, least=0.5)


class Identity:
    def __init__(self, value):
        self.value = value

    def __eq__(self, other):
        return self.value is other.value


def snapshot(model) -> dict:
    """All that a module is made of, by identity, down to the entries of its dictionaries; and the weights' bits."""
    attributes = {}
    for path, module in model.named_modules():
        attributes[path] = type(module)
        for key, value in vars(module).items():
            attributes[path, key] = Identity(value)
            if isinstance(value, dict):
                attributes[path, key, "items"] = [(entry, Identity(item)) for entry, item in value.items()]
    return {
        "attributes": attributes,
        "parameters": [
            (path, Identity(parameter), parameter.data_ptr()) for path, parameter in model.named_parameters()
        ],
        "state": {key: value.view(torch.uint8).numpy().tobytes() for key, value in model.state_dict().items()},
    }


@pytest.mark.parametrize("perturbation", [LowRank(1), Gaussian()], ids=name)
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen3_moe"])
def test_the_model_is_left_as_it_was(architecture, perturbation):
    model = make(CONFIGS[architecture])
    batch = batch_of(model, perturbation)
    before = snapshot(model)
    assert batch.check() is None
    assert snapshot(model) == before
    with batch.install(MEMBERS, SIGMA):
        logits_of(model, tokens(3))
    assert snapshot(model) == before
    with pytest.raises(KeyboardInterrupt), batch.install(MEMBERS, SIGMA):
        raise KeyboardInterrupt
    assert snapshot(model) == before


def test_the_model_is_left_as_it_was_when_members_cannot_be_made(monkeypatch):
    model = make(CONFIGS["llama"])
    batch = batch_of(model, LowRank(1))
    before = snapshot(model)
    all_of_members = batch.weights.all_of_members

    def fail_at_the_last(members, sigma):
        for shard, values in all_of_members(members, sigma):
            if shard is batch.weights.shards[-1]:
                raise MemoryError
            yield shard, values

    monkeypatch.setattr(batch.weights, "all_of_members", fail_at_the_last)
    with pytest.raises(MemoryError), batch.install(MEMBERS, SIGMA):
        pass
    assert snapshot(model) == before


@pytest.mark.parametrize("perturbation", [LowRank(1), Gaussian()], ids=name)
def test_the_weights_are_shared_and_saved_unperturbed(perturbation):
    model = make(CONFIGS["llama_biases"])
    batch = batch_of(model, perturbation)
    before = snapshot(model)
    with batch.install(MEMBERS, SIGMA):
        inside = snapshot(model)
        assert inside["state"] == before["state"]
        assert inside["parameters"] == before["parameters"]
        projection = model.model.layers[0].self_attn.q_proj
        parameter = projection._parameters["weight"]
        assert projection.weight is not parameter
        assert projection.weight.shared.data_ptr() == parameter.data_ptr()
        assert isinstance(projection.weight.values, Factors) == isinstance(perturbation, LowRank)


def test_low_rank_members_take_no_copies_of_matrices():
    model = make(CONFIGS["mixtral"])
    batch = batch_of(model, LowRank(1))
    with batch.install(MEMBERS, SIGMA):
        for module in model.modules():
            for attribute, parameter in module.named_parameters(recurse=False):
                if parameter.dim() > 1:
                    values = getattr(module, attribute).values
                    matrices = parameter.shape[:-2].numel()
                    numbers = len(MEMBERS) * matrices * sum(parameter.shape[-2:])
                    assert values.left.numel() + values.right.numel() == numbers
                    assert values.left.untyped_storage().nbytes() == values.left.nbytes


def test_members_start_from_the_updated_weights():
    model = make(CONFIGS["llama"])
    optimizer = evolution(model, LowRank(1))
    batch = PopulationBatch(model, optimizer.weights)
    before = logits_of(model, tokens(3))
    optimizer.tell(optimizer.ask(), list(range(30)))
    optimizer.param_groups[0]["lr"] = 0.1
    optimizer.step()
    with optimizer.weights.in_checkpoint_dtype():
        pass
    assert distance(logits_of(model, tokens(3)), before) > 0.05
    with batch.install(MEMBERS, SIGMA):
        together = logits_of(model, tokens(3))
    optimizer.perturb(MEMBERS[1])
    assert distance(together[1], logits_of(model, tokens(3))[1]) < 1e-5


@pytest.mark.parametrize("perturbation", PERTURBATIONS, ids=name)
def test_adapters(perturbation):
    model = make(CONFIGS["llama"])
    adapter = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model, adapter).eval()
    for path, parameter in model.named_parameters():
        if "lora_B" in path:
            nn.init.normal_(parameter, std=0.1)
    optimizer = evolution(model, perturbation)
    assert all("lora_" in shard.name for shard in optimizer.weights.shards)
    check_logits(model, optimizer, [0, 0, 1, 1, 2, 2], [2, 0, 1, 2, 1, 2])
    batch = PopulationBatch(model, optimizer.weights)
    batch.check()
    assert batch.cache_bytes == 2 * 2 * 2 * 8 * 4
    assert batch.fitting(rows=1, tokens=10)[0] > 0


@pytest.mark.parametrize("perturbation", [LowRank(1), Gaussian()], ids=name)
@pytest.mark.parametrize(
    ("architecture", "part"),
    [
        ("llama", "norm"),
        ("llama", "embed_tokens"),
        ("llama_biases", "bias"),
        ("llama_biases", "weight"),
        ("gpt2", "bias"),
        ("gpt2", "weight"),
        ("gpt2", "mlp.c_fc"),
        ("qwen3_moe", "down_proj"),
        ("qwen3_moe", "gate_up_proj"),
        ("mixtral", "self_attn"),
    ],
)
def test_parts_that_are_not_trained_stay(architecture, part, perturbation):
    model = make(CONFIGS[architecture])
    optimizer = evolution(model, perturbation, trained=lambda path: part in path)
    bits = {path: parameter.clone() for path, parameter in model.named_parameters()}
    check_logits(model, optimizer, [0, 0, 1, 1, 2, 2], [2, 0, 1, 2, 1, 2], least=0.01)
    with PopulationBatch(model, optimizer.weights).install(MEMBERS, SIGMA):
        for path, parameter in model.named_parameters():
            module, attribute = model.get_submodule(path.rpartition(".")[0]), path.rpartition(".")[2]
            assert (getattr(module, attribute) is parameter) == (part not in path)
            assert torch.equal(parameter, bits[path])


class Exponential(nn.Linear):
    def forward(self, x):
        return x @ torch.exp(self.weight).T


class Product(nn.Linear):
    def forward(self, x):
        return x @ self.weight.T


class Secretive(nn.Linear):
    def forward(self, x):
        return nn.functional.linear(x, self._parameters["weight"])


class Summed(nn.Linear):
    def forward(self, x):
        return nn.functional.linear(x.sum(0, keepdim=True), self.weight)


class Idle(nn.Linear):
    def forward(self, x):
        return x.new_zeros(*x.shape[:-1], self.out_features)


@pytest.mark.parametrize("perturbation", PERTURBATIONS, ids=name)
@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Exponential, "`exp` of a tensor of 2 dimensions"),
        (Product, "of a tensor of 2 dimensions"),
        (Secretive, "no function that is known uses it"),
        (Summed, "shape (1, 5, 64) do not tell apart 3 rows"),
        (Idle, "no function that is known uses it"),
    ],
)
def test_check_names_the_module_that_cannot_be_batched(kind, reason, perturbation):
    model = make(CONFIGS["llama"])
    model.model.layers[1].mlp.down_proj = kind(64, 32, bias=False).eval()
    batch = batch_of(model, perturbation)
    before = snapshot(model)
    where = f"`model.layers.1.mlp.down_proj` ({kind.__name__}) with its parameter `weight`: "
    problem = batch.check()
    assert problem.startswith(where)
    assert reason in problem.removeprefix(where)
    assert snapshot(model) == before


@pytest.mark.parametrize("perturbation", PERTURBATIONS, ids=name)
@pytest.mark.parametrize(
    ("architecture", "where"),
    [
        ("gpt_oss", "`model.layers.0.self_attn` (GptOssAttention) with its parameter `sinks`: "),
        ("mamba", "`backbone.layers.0.mixer` (MambaMixer) with its parameter `A_log`: "),
    ],
)
def test_check_names_architectures_that_cannot_be_batched(architecture, where, perturbation):
    assert batch_of(make(UNKNOWN[architecture]), perturbation).check().startswith(where)


# ---- memory ----


@pytest.fixture
def free(monkeypatch):
    """Say how many bytes a group may take."""

    def say(size: float) -> None:
        monkeypatch.setattr(
            population_batch, "free_memory", lambda device: int(size / population_batch.FREE_SHARE) + 2
        )

    return say


ROWS, TOKENS = 5, 20


def sizes(model, perturbation, dtype) -> tuple[int, int, PopulationBatch]:
    """Bytes of a sequence and of a member."""
    itemsize = dtype.itemsize
    batch = batch_of(model.to(dtype), perturbation)
    assert batch.check() is None
    assert batch.cache_bytes == 2 * 2 * 2 * 8 * itemsize  # keys and values, layers, heads, width
    numbers = 0
    for parameter in model.parameters():
        low_rank = isinstance(perturbation, LowRank) and parameter.dim() > 1
        numbers += perturbation.rank * sum(parameter.shape) if low_rank else parameter.numel()
    return batch.cache_bytes * TOKENS + 259 * (itemsize + 8), numbers * itemsize, batch


@pytest.fixture(params=PERTURBATIONS, ids=name)
def needs(request):
    return sizes(make_model(), request.param, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("heads", [2, 4])
def test_bytes_of_a_tokens_keys_and_values(layers, heads, dtype):
    batch = batch_of(make_model(num_hidden_layers=layers, num_key_value_heads=heads, dtype=dtype), LowRank(1))
    assert batch.check() is None
    assert batch.cache_bytes == 2 * layers * heads * 8 * dtype.itemsize


@pytest.mark.parametrize("count", [1, 2, 7, 100])
def test_a_group_has_as_many_members_as_fit(needs, free, count):
    row, member, batch = needs
    free(count * (member + ROWS * row))
    assert batch.fitting(ROWS, TOKENS) == (count, count * ROWS)
    free((count + 1) * (member + ROWS * row) - 64)
    assert batch.fitting(ROWS, TOKENS) == (count, count * ROWS)


@pytest.mark.parametrize("count", [1, 2, 7, 100])
def test_fewer_sequences_at_once_leave_room_for_members(needs, free, count):
    row, member, batch = needs
    free(count * member + 3 * row)
    assert batch.fitting(ROWS, TOKENS, most_rows=3) == (count, 3)
    free((count + 1) * member + 3 * row - 64)
    assert batch.fitting(ROWS, TOKENS, most_rows=3) == (count, 3)


@pytest.mark.parametrize("most_rows", [None, 3, 100])
def test_a_member_that_does_not_fit_gets_fewer_sequences_at_once(needs, free, most_rows):
    row, member, batch = needs
    free(member + 2 * row)
    assert batch.fitting(ROWS, TOKENS, most_rows) == (1, 2)
    free(member + 3 * row - 64)
    assert batch.fitting(ROWS, TOKENS, most_rows) == (1, 2)
    free(member + row - 64)
    assert batch.fitting(ROWS, TOKENS, most_rows) == (1, 0)
    free(0)
    assert batch.fitting(ROWS, TOKENS, most_rows) == (1, 0)


def test_bfloat16_takes_half_the_memory_of_members_and_cache(free):
    row, member, batch = sizes(make_model(), LowRank(1), torch.bfloat16)
    member += sum(2 * shard.working.numel() for shard in batch.weights.shards if len(shard.shape) == 1)  # in float32
    free(6 * (member + ROWS * row))
    assert batch.fitting(ROWS, TOKENS) == (6, 6 * ROWS)


def test_noise_of_vectors_is_not_lost_in_bfloat16():
    """A norm's weights near 1 would keep 3 % of the values of a sigma of 1e-3."""
    x = torch.randn(6, 4, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    weights = Weights([("norm.weight", nn.Parameter(torch.ones(64)))], torch.bfloat16, perturbation=LowRank(1))
    (shard,) = weights.shards
    members = [Member(1), Member(2), Member(2, -1)]
    values = weights.of_members(shard, members, 1e-3)
    z = torch.stack([member.sign * noise.fill(torch.empty(64), "norm.weight", member.seed) for member in members])
    torch.testing.assert_close(values, 1 + 1e-3 * z, rtol=0, atol=1e-7)
    rows = population_batch.Rows(3, x.device)
    rows.assign([0, 0, 1, 1, 2, 2])
    weight = population_batch.MemberParameter.make("norm.weight", shard.parameter.data, values, rows)
    exact = (1 + 1e-3 * z).repeat_interleave(2, 0)[:, None]
    ones = torch.ones(64, dtype=torch.bfloat16)
    results = {
        "weight * x": (weight * x, exact * x.float()),
        "x + weight": (x + weight, exact + x.float()),
        "(2 + weight) * x": ((2 + weight) * x, (2 + exact) * x.float()),
        "rms_norm": (F.rms_norm(x, (64,), weight), exact * F.rms_norm(x, (64,)).float()),
        "layer_norm": (F.layer_norm(x, (64,), ones, weight), exact + F.layer_norm(x, (64,)).float()),
        "type_as": (x.float().type_as(weight), x.float()),
    }
    for name, (found, expected) in results.items():
        assert found.dtype == torch.bfloat16, name
        torch.testing.assert_close(found, expected.bfloat16(), msg=name, rtol=0, atol=0)


def test_longer_sequences_leave_room_for_fewer_members(needs, free):
    row, member, batch = needs
    free(50 * (member + ROWS * row))
    members = [batch.fitting(ROWS, length)[0] for length in (TOKENS, 4 * TOKENS, 16 * TOKENS)]
    assert members[0] > members[1] > members[2] > 0


def test_free_memory_of_the_host():
    assert 0 < population_batch.free_memory(torch.device("cpu")) <= psutil.virtual_memory().total


# ---- what the trial finds ----


class ByKeyword(nn.Linear):
    def forward(self, x):
        return nn.functional.linear(input=x, weight=self.weight)


class Scaled(nn.Linear):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, x):
        return super().forward(x) * self.scale


class ExpertList(nn.Module):
    """A mixture that reads its experts token by token."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(64, 32, bias=False) for _ in range(2))

    def forward(self, x):
        flat = x.reshape(-1, x.shape[-1])
        chosen = (flat.sum(-1) > 0).long()
        out = flat.new_zeros(len(flat), 32)
        for i, expert in enumerate(self.experts):
            out[chosen == i] = expert(flat[chosen == i])
        return out.view(*x.shape[:-1], 32)


@pytest.mark.parametrize("perturbation", [LowRank(1), Gaussian()], ids=name)
@pytest.mark.parametrize("kind", [ByKeyword, Scaled])
def test_keywords_and_scalars(kind, perturbation):
    torch.manual_seed(1)
    model = make(CONFIGS["llama"])
    model.model.layers[1].mlp.down_proj = kind(64, 32, bias=False).eval()
    check_logits(model, evolution(model, perturbation), [0, 0, 1, 1, 2, 2], [2, 0, 1, 2, 1, 2])


@pytest.mark.parametrize("perturbation", [LowRank(1), Gaussian()], ids=name)
def test_experts_that_are_read_token_by_token_fall_back(perturbation):
    model = make(CONFIGS["llama"])
    torch.manual_seed(1)
    model.model.layers[1].mlp.down_proj = ExpertList().eval()
    batch = batch_of(model, perturbation)
    before = snapshot(model)
    assert batch.check() is not None
    assert snapshot(model) == before


@pytest.mark.parametrize("master_weights", ["device", "none"])
def test_wrong_answers_are_found(master_weights, monkeypatch):
    model = make(CONFIGS["llama"])
    optimizer = EvolutionStrategy(
        list(model.named_parameters()), sigma=SIGMA, perturbation=LowRank(1), master_weights=master_weights
    )
    batch = PopulationBatch(model, optimizer.weights)
    before = snapshot(model)
    assert batch.check() is None
    monkeypatch.setattr(
        population_batch, "_add_low_rank", lambda rows, x, out, left, right: out.add_(x.sum(-1, keepdim=True))
    )
    assert "away from their answers one at a time" in batch.check()
    assert snapshot(model) == before


def test_values_of_higher_precision_than_the_activations():
    rows = population_batch.Rows(2, torch.device("cpu"))
    shared, values = torch.ones(4, dtype=torch.bfloat16), torch.full((2, 4), 1.001)
    weight = population_batch.MemberParameter.make("norm", shared, values, rows)
    x = torch.full((2, 3, 4), 512.0, dtype=torch.bfloat16)
    assert (weight * x).dtype == torch.bfloat16
    assert (weight.float().to(torch.float32) * x.float()).eq(torch.tensor(1.001) * 512).all()
