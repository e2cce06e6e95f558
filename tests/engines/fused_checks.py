"""Checks of the kernels of population batches, run by `test_fused_kernels.py` in processes of their own.

On CPU tensors if Triton's interpreter is on, else on CUDA tensors.
"""

import contextlib
import functools
import os
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, GemmaConfig, GPT2Config, LlamaConfig, Qwen2Config, Qwen3Config
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from es_trainer.engines import PopulationBatch, fused_low_rank, fused_rms_norm, population_batch
from es_trainer.engines.running_batch import RunningBatch
from es_trainer.evolution import EvolutionStrategy, Member
from es_trainer.noise.shapes import LowRank


INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZES = [(1, 1), (3, 127), (127, 3), (576, 1000), (1000, 576)]  # of activations before and after
SMALL_SIZES = [(1, 1), (3, 127), (127, 40)]
MEMBERS = 3
EVEN, UNEVEN = [0, 0, 1, 1], [2, 0, 2]


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def indices(members: list[int]) -> torch.Tensor:
    return torch.tensor(members, device=DEVICE)


def rounding(dtype: torch.dtype) -> float:
    """The largest relative error of a number. The interpreter cuts bits off in place of rounding to bfloat16."""
    return torch.finfo(dtype).eps / (1 if INTERPRETED else 2)


def assert_within(found: torch.Tensor, wanted: torch.Tensor, error: torch.Tensor) -> None:
    assert found.shape == wanted.shape
    assert not found.isnan().any()
    assert ((found.double() - wanted).abs() <= error).all()


def assert_bits(found: torch.Tensor, wanted: torch.Tensor) -> None:
    assert torch.equal(found.contiguous().view(torch.uint8), wanted.contiguous().view(torch.uint8))


# ---- low-rank terms ----


def case(rank, width, out_width, members, dtype=torch.float32, tokens=1) -> list[torch.Tensor]:
    x, out = (draw(len(members), tokens, size, dtype=dtype, seed=size) for size in (width, out_width))
    left, right = (draw(MEMBERS, rank, size, dtype=dtype, seed=size + 1) for size in (out_width, width))
    return [x, out, left, right]


def add(x, out, left, right, members) -> torch.Tensor:
    fused_low_rank.add_low_rank(x, out, left, right, indices(members))
    return out


def check_terms(x, out, left, right, members) -> None:
    before, exact = out.clone(), [tensor.double() for tensor in (x, out, left[members], right[members])]
    wanted, terms = (a[1] + a[0] @ a[3].mT @ a[2] for a in (exact, [tensor.abs() for tensor in exact]))
    found = add(x, out, left, right, members)
    # Sums in float32, and one rounding
    assert_within(found, wanted, rounding(out.dtype) * wanted.abs() + 1e-5 * terms)
    assert not torch.equal(found, before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("members", [EVEN, UNEVEN], ids=str)
@pytest.mark.parametrize("rank", [1, 2, 5, 48])
def test_each_row_gets_its_members_term(rank, members, dtype):
    for sizes in SIZES if rank < 48 else SMALL_SIZES:
        check_terms(*case(rank, *sizes, members, dtype), members)
    check_terms(*case(rank, 127, 40, members, dtype, tokens=3), members)


@pytest.mark.parametrize("programs", [1, 1 << 20])
def test_outputs_can_be_shared_by_programs(programs, monkeypatch):
    monkeypatch.setattr(fused_low_rank, "PROGRAMS", programs)
    check_terms(*case(1, 40, 5000, UNEVEN), UNEVEN)


@pytest.mark.parametrize("rank", [1, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_rows_bits_depend_on_no_other(dtype, rank, monkeypatch):
    members, tokens = [2, 0, 1, 1, 2], 2
    for sizes in [(127, 3), (1000, 2500), (2500, 40)] if rank == 1 else [(127, 3), (600, 300)]:
        x, out, left, right = case(rank, *sizes, members, dtype, tokens)
        whole = add(x, out.clone(), left, right, members)
        for rows in ([3], [1, 4], [2, 0]):
            mine = [members[row] for row in rows]
            assert_bits(add(x[rows], out[rows], left, right, mine), whole[rows])
            for token in range(tokens):  # one at a time, in memory of their own
                one = (tensor[rows, token][:, None].contiguous() for tensor in (x, out))
                assert_bits(add(*one, left, right, mine), whole[rows, token][:, None])
        with monkeypatch.context() as patch:
            patch.setattr(fused_low_rank, "PROGRAMS", 1)
            assert_bits(add(x, out.clone(), left, right, members), whole)


def surrounded(tensor: torch.Tensor, transposed: bool) -> torch.Tensor:
    """The same values in the middle of memory that is full of NaN, with other strides."""
    shape = [2 * size + 3 for size in tensor.shape]
    memory = tensor.new_full(shape[::-1] if transposed else shape, torch.nan)
    memory = memory.permute(2, 1, 0) if transposed else memory
    view = memory[tuple(slice(1, 1 + 2 * size, 2) for size in tensor.shape)]
    return view.copy_(tensor)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("rank", [1, 5])
def test_strides_are_respected_and_nothing_else_is_touched(rank, transposed):
    for sizes in SMALL_SIZES:
        plain = case(rank, *sizes, UNEVEN, tokens=2)
        x, out, left, right = (surrounded(tensor, transposed) for tensor in plain)
        torch.testing.assert_close(add(x, out, left, right, UNEVEN), add(*plain, UNEVEN), rtol=1e-5, atol=1e-4)
        # Every other number of the memory is that which it was
        assert out._base.isnan().sum() == out._base.numel() - out.numel()
        assert x._base.isnan().sum() == x._base.numel() - x.numel()


# ---- norms ----


def norm_of(x, weights, members, eps=1e-6) -> torch.Tensor:
    return fused_rms_norm.rms_norm(x, weights, indices(members), eps)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("members", [EVEN, UNEVEN], ids=str)
def test_norms_are_those_of_models(members, dtype):
    for width in (1, 3, 127, 576, 2500):
        x, weights = draw(len(members), 2, width, dtype=dtype), draw(MEMBERS, width, seed=1)
        found = norm_of(x, weights, members, 1e-3)
        assert found.dtype == dtype
        norm = LlamaRMSNorm(width, 1e-3)
        for row, member in enumerate(members):
            norm.weight.data = weights[member].double()
            wanted = norm(x[row].double())
            # Rounded twice, among the smallest numbers by a fixed step
            smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
            error = (2.1 * rounding(dtype) + 1e-6) * wanted.abs() + 2 * smallest * (1 + weights[member].abs())
            assert_within(found[row], wanted, error)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_norms_bits_depend_on_no_other_row(dtype):
    members, tokens = [2, 0, 1, 1, 2] * 6, 2
    for width in (127, 2500):
        x, weights = draw(len(members), tokens, width, dtype=dtype), draw(MEMBERS, width, seed=1)
        whole = norm_of(x, weights, members)
        for rows in ([3], list(range(1, 30, 2))):
            mine = [members[row] for row in rows]
            assert_bits(norm_of(x[rows], weights, mine), whole[rows])
            assert_bits(norm_of(x[rows, 1:2], weights, mine), whole[rows, 1:2])


@pytest.mark.parametrize("eps", [None, 0.1])
def test_norms_of_torch_are_those_without_the_kernel(eps, monkeypatch):
    rows = population_batch.Rows(MEMBERS, torch.device(DEVICE))
    rows.assign(UNEVEN)
    weight = population_batch.MemberParameter.make("norm.weight", draw(8), draw(MEMBERS, 8, seed=1), rows)
    x = draw(len(UNEVEN), 2, 8) * 1e-3

    def norm(with_kernels: bool) -> torch.Tensor:
        monkeypatch.setattr(population_batch, "_has_kernels", lambda device: with_kernels)
        return F.rms_norm(x, (8,), weight, eps)

    torch.testing.assert_close(norm(True), norm(False))


# ---- models ----


SHAPE = {"vocab_size": 259, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
SHAPE |= {"num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.3, "head_dim": 8}
CONFIGS = {"llama": LlamaConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config, "gpt2": GPT2Config, "gemma": GemmaConfig}


def make(architecture: str, layers: int = 1, dtype: torch.dtype = torch.float32):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(
        CONFIGS[architecture](**SHAPE, num_hidden_layers=layers), dtype=dtype
    ).eval()


def batch_of(model, rank: int = 1) -> PopulationBatch:
    strategy = EvolutionStrategy(list(model.named_parameters()), perturbation=LowRank(rank))
    return PopulationBatch(model, strategy.weights)


class Operations(TorchDispatchMode):
    """Notes what a GPU would be given to do: operations of torch that write something, and launches of kernels."""

    def __init__(self, monkeypatch, fused: bool = True, run: bool = True):
        super().__init__()
        self.names: list[str] = []
        self.run = run
        monkeypatch.setattr(population_batch, "_has_kernels", lambda device: fused)
        for module, name in ((fused_low_rank, "low_rank_kernel"), (fused_rms_norm, "rms_norm_kernel")):
            monkeypatch.setattr(module, name, self._counted(getattr(module, name), name))

    def _counted(self, kernel, name):
        class Counted:
            def __getitem__(_, grid):
                return functools.partial(self._launch, name, kernel[grid])

        return Counted()

    def _launch(self, name, launch, *args, **options) -> None:
        self.names.append(name)
        if self.run:
            with _disable_current_modes():  # the interpreter's own
                launch(*args, **options)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        with self:
            out = function.decompose(*args, **kwargs)
        if out is not NotImplemented:
            return out
        out = function(*args, **kwargs)
        given, made = ({id_of(tensor) for tensor in tensors_of(values)} for values in ([args, kwargs], out))
        written = function._schema.is_mutable or not made <= given
        if written and "empty" not in function.name() and any(tensor.numel() for tensor in tensors_of(out)):
            self.names.append(function.name())
        return out


def tensors_of(values) -> list[torch.Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, torch.Tensor)]


def id_of(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


@torch.inference_mode()
def logits_of(model, batch: PopulationBatch, members: list[int]) -> torch.Tensor:
    ids = torch.randint(3, 259, (len(members), 3), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    with batch.install([Member(1), Member(2, -1), Member(3)], 0.05) as rows:
        rows.assign(members)
        return model(input_ids=ids, position_ids=torch.arange(3, device=DEVICE).expand_as(ids)).logits


@pytest.mark.parametrize(
    ("architecture", "rank"), [("llama", 5), ("qwen2", 1), ("qwen3", 1), ("gpt2", 1), ("gemma", 1)]
)
def test_logits_are_those_without_the_kernels(architecture, rank, monkeypatch):
    model = make(architecture).to(DEVICE)
    batch = batch_of(model, rank)
    for members in (EVEN, UNEVEN):
        with monkeypatch.context() as patch, Operations(patch, fused=False) as plain:
            wanted = logits_of(model, batch, members)
        with monkeypatch.context() as patch, Operations(patch) as fused:
            found = logits_of(model, batch, members)
        assert not {"low_rank_kernel", "rms_norm_kernel"} & set(plain.names)
        assert "low_rank_kernel" in fused.names
        assert ("rms_norm_kernel" in fused.names) == (architecture not in ("gpt2", "gemma"))  # which have others
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_the_trial_knows_the_kernels(monkeypatch):
    batch = batch_of(make("llama").to(DEVICE))
    with monkeypatch.context() as patch, Operations(patch) as operations:
        assert batch.check() is None
    assert "low_rank_kernel" in operations.names
    with monkeypatch.context() as patch, Operations(patch, run=False):
        assert "away from their answers one at a time" in batch.check()


# ---- launches ----

# Of a layer for each token: without members; with them, and as many or differently many rows of each; with kernels.
# Those without members are Transformers' own
LAUNCHES = {
    ("llama", torch.float32): (36, 59, 73, 33),
    ("llama", torch.bfloat16): (40, 65, 79, 33),
    ("qwen2", torch.bfloat16): (40, 71, 85, 39),
}


@torch.inference_mode()
def launches_of_a_token(monkeypatch, model, members: list[int] | None, fused: bool, longer: int) -> Counter:
    with monkeypatch.context() as patch, contextlib.ExitStack() as stack:
        operations = stack.enter_context(Operations(patch, fused, run=False))
        rows = members and stack.enter_context(batch_of(model).install([Member(1), Member(2, -1), Member(3)], 0.05))
        batch = RunningBatch(model, rows)
        texts = [[5 + row, 6, 7] for row in range(4)]
        texts[0] += [8] * longer
        batch.join(texts, members or [0] * 4, [None] * 4)
        operations.names.clear()
        batch.step(torch.arange(4))
    return Counter(operations.names)


@pytest.mark.parametrize(("architecture", "dtype"), LAUNCHES, ids=str)
def test_launches_of_a_layer(architecture, dtype, monkeypatch):
    """Members make at most as many launches as the model alone, which are counted on CPU."""

    def of_a_layer(members: list[int] | None, fused: bool = False, longer: int = 0) -> Counter:
        models = (make(architecture, layers, dtype) for layers in (3, 2))
        three, two = (launches_of_a_token(monkeypatch, model, members, fused, longer) for model in models)
        return three - two

    alone, even, uneven, kernels = LAUNCHES[architecture, dtype]
    assert of_a_layer(None).total() == alone
    assert of_a_layer([0, 0, 1, 1]).total() == even
    assert of_a_layer([0, 0, 2, 0]).total() == uneven
    for members in ([0, 0, 1, 1], [0, 0, 2, 0]):
        fused = of_a_layer(members, fused=True)
        assert fused["low_rank_kernel"] == 7 and fused["rms_norm_kernel"] == 2
        assert fused.total() == kernels
    # With padding, torch makes a mask of numbers in each layer, in three launches
    assert of_a_layer(members, fused=True, longer=1).total() == kernels + 3
