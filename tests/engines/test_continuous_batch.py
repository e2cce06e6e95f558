"""Requests that come and go, each answered as if it were alone."""

import random

import pytest
import torch
from conftest import make_model
from transformers import AutoModelForCausalLM, MambaConfig

from es_trainer.engines import PopulationBatch, TransformersEngine
from es_trainer.engines.continuous_batch import ContinuousBatch
from es_trainer.engines.requests import Request
from es_trainer.evolution import EvolutionStrategy
from es_trainer.evolution.population import Member
from es_trainer.noise.shapes import LowRank


GREEDY = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": None}
SAMPLED = {**GREEDY, "temperature": 1.0}


@pytest.fixture
def engine(tokenizer, config):
    def make(model=None, **options) -> TransformersEngine:
        return TransformersEngine(model or make_model(), tokenizer, config(**{"max_completion_length": 12, **options}))

    return make


def request(tokens: int, member: int = 0, **options) -> Request:
    given = {"max_tokens": 12, "sampling": GREEDY, "seed": 0, **options}
    return Request([(3 + 7 * tokens + 5 * i) % 250 for i in range(tokens)], member, **given)


def answer_all(batch: ContinuousBatch) -> None:
    while len(batch):
        batch.step()


def alone(engine, wanted: Request, members=None) -> Request:
    batch = ContinuousBatch(engine, members)
    copy = Request(wanted.ids, wanted.member, wanted.max_tokens, wanted.sampling, wanted.seed, wanted.stop)
    batch.add(copy)
    answer_all(batch)
    return copy


def test_requests_join_and_leave_as_they_come(engine):
    engine = engine()
    strategy = EvolutionStrategy(list(engine.model.named_parameters()), population_size=4, perturbation=LowRank(1))
    numbers = random.Random(0)
    with PopulationBatch(engine.model, strategy.weights).install([Member(1), Member(2), Member(3)], 0.2) as members:
        batch = ContinuousBatch(engine, members)
        requests = [
            request(
                numbers.randint(1, 30),
                numbers.randrange(3),
                max_tokens=numbers.randint(1, 20),
                sampling=numbers.choice([GREEDY, SAMPLED]),
                seed=number,
            )
            for number in range(40)
        ]
        coming = list(requests)
        while coming or len(batch):
            for _ in range(min(len(coming), numbers.randint(0, 3))):
                batch.add(coming.pop())
            batch.step()
        expected = [alone(engine, each, members) for each in requests]
    assert [each.new for each in requests] == [each.new for each in expected]
    assert all(each.finish_reason for each in requests)
    assert len({tuple(each.new) for each in requests}) > 30


def test_answers_are_those_of_generate(engine):
    engine = engine()
    prompts = [[5, 6, 7], [8, 9, 10, 11, 12]]
    made = engine.generate(prompts, seed=0)
    batch = ContinuousBatch(engine, None)
    requests = [Request(ids, 0, 12, GREEDY, 0) for ids in prompts]
    for each in requests:
        batch.add(each)
    answer_all(batch)
    assert [each.new for each in requests] == [completion.ids for completion in made]
    assert [each.text for each in requests] == [completion.text for completion in made]


def test_what_the_config_says_of_tokens_holds(engine):
    engine = engine(generation_kwargs={"suppress_tokens": list(range(10, 250)), "min_new_tokens": 4})
    batch = ContinuousBatch(engine, None)
    asked = request(5)
    batch.add(asked)
    answer_all(batch)
    assert asked.new == engine.generate([asked.ids], seed=0)[0].ids
    assert not set(asked.new) & set(range(10, 250))


def test_stop_texts_are_left_out(engine):
    engine = engine()
    whole = alone(engine, request(5))
    stop = whole.text[4:6]
    cut = alone(engine, request(5, stop=["never", stop]))
    assert cut.text == whole.text[: whole.text.index(stop)] and cut.finish_reason == "stop"


def test_who_waits_is_answered_later(engine):
    batch = ContinuousBatch(engine(), None, most_rows=2)
    requests = [request(4 + i) for i in range(5)]
    for each in requests:
        batch.add(each)
    batch.step()
    assert [len(each.new) for each in requests] == [1, 1, 0, 0, 0]
    answer_all(batch)
    assert all(each.finish_reason for each in requests)


def test_cancelled_requests_leave(engine):
    batch = ContinuousBatch(engine(), None)
    requests = [request(4 + i) for i in range(3)]
    for each in requests:
        batch.add(each)
    batch.step()
    requests[0].cancelled = requests[2].cancelled = True
    answer_all(batch)
    assert [len(each.new) for each in requests] == [1, 12, 1]
    assert requests[1].new == alone(batch.engine, request(5)).new


def test_who_waits_takes_the_place_of_who_is_cancelled(engine):
    batch = ContinuousBatch(engine(), None, most_rows=2)
    requests = [request(4 + i) for i in range(4)]
    for each in requests:
        batch.add(each)
    batch.step()
    requests[0].cancelled = requests[1].cancelled = True
    for _ in range(40):
        batch.step()
    assert len(batch) == 0 and [len(each.new) for each in requests] == [1, 1, 12, 12]


def test_a_conversation_goes_on_from_what_was_read(engine):
    engine = engine()
    first = alone(engine, request(20))
    shapes = []
    engine.model.register_forward_pre_hook(
        lambda model, args, kwargs: shapes.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    second = Request(first.ids + first.new + [40, 41], 0, 3, GREEDY, 0, cache=first.cache)
    batch = ContinuousBatch(engine, None)
    batch.add(second)
    answer_all(batch)
    assert shapes == [3, 1, 1]
    assert second.new == alone(engine, Request(second.ids, 0, 3, GREEDY, 0)).new


def test_models_with_states_of_their_own_are_refused(engine):
    options = {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}
    model = AutoModelForCausalLM.from_config(MambaConfig(vocab_size=259, **options))
    with pytest.raises(ValueError, match="MambaForCausalLM cannot answer requests as they come"):
        ContinuousBatch(engine(model), None)


def test_nan(engine):
    engine = engine()
    batch = ContinuousBatch(engine, None)
    batch.add(request(4))
    batch.step()
    with torch.no_grad():
        engine.model.lm_head.weight[:] = torch.nan
    batch.step()
    with pytest.raises(FloatingPointError, match="not numbers"):
        batch.step()
