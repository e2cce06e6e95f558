"""What all texts begin with is read once by each member, with the same logits as if it were read for each text."""

import pytest
import torch
from conftest import make_model
from test_running_batch import ARCHITECTURES, check, make, text

from es_trainer.engines import PopulationBatch, TransformersEngine, running_batch
from es_trainer.engines.running_batch import RunningBatch
from es_trainer.engines.shared_prefix import LEAST_SAVED, shared_prefix
from es_trainer.evolution import EvolutionStrategy
from es_trainer.evolution.population import Member
from es_trainer.noise.shapes import LowRank


PREFIX = text(100)
QUESTIONS = [text(length, start) for length, start in [(3, 101), (9, 102), (5, 103), (5, 104)]]
TEXTS = [PREFIX + question for question in QUESTIONS]


def test_the_longest_beginning_of_all_texts():
    assert shared_prefix(TEXTS, [0] * 4) == PREFIX
    assert shared_prefix([TEXTS[0] + [1], TEXTS[0] + [2], *TEXTS], [0] * 6) == PREFIX
    assert shared_prefix([*TEXTS, [1, *PREFIX]], [0] * 5) == []


def test_each_text_keeps_a_token_to_read():
    assert shared_prefix([*TEXTS, PREFIX], [0] * 5) == PREFIX[:-1]


def test_only_if_it_saves_enough():
    three = [[9] * LEAST_SAVED + [1], [9] * LEAST_SAVED + [2]]
    assert shared_prefix(three, [0, 0]) == [9] * LEAST_SAVED
    assert shared_prefix([tokens[1:] for tokens in three], [0, 0]) == []
    # A text that is read once anyhow, and members that read one text each, have nothing to save
    assert shared_prefix([three[0]] * 9, [0] * 9) == []
    assert shared_prefix(three, [0, 1]) == []
    assert shared_prefix([], []) == []


def forward_shapes(model) -> list[tuple[int, ...]]:
    shapes: list[tuple[int, ...]] = []
    model.register_forward_pre_hook(
        lambda model, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    return shapes


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.inference_mode()
def test_rows_have_the_logits_of_their_whole_texts(architecture):
    model = make(architecture)
    batch = RunningBatch(model)
    shapes = forward_shapes(model)
    logits = batch.join(TEXTS, [0] * 4, [None] * 4)
    # Layers that keep a window of what was read have no beginning to give
    assert shapes == ([(4, 109)] if architecture == "gemma3" else [(1, 100), (4, 9)])
    check(batch, logits, model)
    check(batch, batch.step(torch.tensor([1, 2, 3, 4])), model)


@torch.inference_mode()
def test_rows_that_have_read_something_go_on_from_there():
    model = make("llama")
    first = RunningBatch(model)
    first.join([TEXTS[1][:106]], [0], [None])
    batch = RunningBatch(model)
    shapes = forward_shapes(model)
    check(batch, batch.join([TEXTS[1], *TEXTS], [0] * 5, [first.cache_of(0), *[None] * 4]), model)
    assert shapes[:3] == [(1, 3), (1, 100), (4, 9)]


@pytest.mark.parametrize(
    ("at_once", "passes"), [(300, [(3, 100), (10, 9)]), (200, [(2, 100), (8, 9), (1, 100), (2, 9)])]
)
@torch.inference_mode()
def test_each_member_reads_it_with_its_own_weights(at_once, passes, monkeypatch):
    monkeypatch.setitem(running_batch.PREFILL_TOKENS, "cpu", at_once)
    model = make_model()
    strategy = EvolutionStrategy(list(model.named_parameters()), sigma=0.2, perturbation=LowRank(1))
    members = [Member(1), Member(2, -1), Member(3)]
    of_rows = [0, 0, 0, 0, 1, 1, 1, 1, 2, 2]
    texts = (TEXTS * 3)[: len(of_rows)]
    with PopulationBatch(model, strategy.weights).install(members, 0.2) as rows:
        shapes = forward_shapes(model)
        together = RunningBatch(model, rows).join(texts, of_rows, [None] * len(texts))
        assert shapes == passes
    for row, (member, tokens) in enumerate(zip(of_rows, texts, strict=True)):
        strategy.perturb(members[member])
        alone = model(input_ids=torch.tensor([tokens])).logits[0, -1]
        torch.testing.assert_close(together[row], alone, rtol=1e-4, atol=1e-4)


def test_weights_that_have_changed_read_it_anew(tokenizer, config):
    model = make_model()
    engine = TransformersEngine(model, tokenizer, config(max_completion_length=6))
    before = engine.generate(TEXTS, seed=0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    after = engine.generate(TEXTS, seed=0)
    assert after == [completion for tokens in TEXTS for completion in engine.generate([tokens], seed=0)]
    assert after != before
