"""`python -m benchmarks.learning`: its runs, with a tiny model, and the page with its tables."""

import json
from dataclasses import replace

import pytest
from conftest import make_tokenizer, save_tiny

from benchmarks.learning import figures, judge, one_run, results, starts
from benchmarks.learning.__main__ import pending
from benchmarks.learning.mazes import OVER, Game, Mazes
from benchmarks.learning.questions import degenerate, passes
from benchmarks.learning.studies import STUDIES
from es_trainer.rollout import Completion


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """Studies of a tiny model, in two steps of each trainer."""
    folder = save_tiny(tmp_path / "model", max_position_embeddings=512)
    for module in (judge, starts):
        monkeypatch.setattr(module, "smollm2", lambda: folder)
    monkeypatch.setattr(results, "RESULTS", tmp_path / "results")
    study = replace(STUDIES["conciseness"], budgets={"es": 256, "grpo": 128}, seeds=range(2))
    monkeypatch.setitem(STUDIES, "conciseness", study)


def test_runs_are_measured_along_the_way_and_done_once(tiny):
    for trainer, step in (("es", 128), ("grpo", 64)):
        following = pending(["conciseness"], [trainer])
        one_run.run(*following)
        run = results.read(results.path_of(*following))
        assert run["done"] and run["trainer"] == trainer
        assert [entry["completions"] for entry in run["history"]] == [0, step, 2 * step]
        first, *_, last = run["history"]
        assert first["seconds"] == 0.0 < last["seconds"] and last["peak_mib"] > 0
        assert first["kl"] < 1e-3 and last["conciseness_reward"] != first["conciseness_reward"]
        assert pending(["conciseness"], [trainer]) != following


def test_the_best_choice_of_the_first_seed_is_run_with_the_others(tiny):
    grpo = STUDIES["conciseness"].arms["grpo"]
    for place, choice in enumerate(grpo.choices):
        assert pending(["conciseness"], ["grpo"]) == ("conciseness", "grpo", 0, choice)
        path = results.path_of("conciseness", "grpo", 0, choice)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"done": False}))  # of a run that was killed, which begins again
        assert pending(["conciseness"], ["grpo"])[3] == choice
        path.write_text(json.dumps({"done": True, "history": [{"conciseness_reward": [0.3, 0.9, 0.5][place]}]}))
    assert pending(["conciseness"], ["grpo"]) == ("conciseness", "grpo", 1, grpo.choices[1])


def test_the_pages_have_the_tables_and_pictures_of_the_runs():
    for page, text in figures.pages().items():
        assert page.read_text() == text, "run `python -m benchmarks.learning --draw`"
    drawn = [study for study in STUDIES if figures.finished(study)]
    assert drawn and all((figures.DOCS / "results" / f"{study}.png").exists() for study in drawn)


def test_pass_at_k_is_the_probability_of_a_right_one_among_k():
    def of_one_prompt(right: int) -> dict[str, float]:
        return passes([[float(sample < right)] for sample in range(8)])

    assert of_one_prompt(2)["pass@1"] == pytest.approx(2 / 8)
    assert of_one_prompt(2)["pass@2"] == pytest.approx(1 - 6 / 8 * 5 / 7)
    assert (of_one_prompt(1)["pass@8"], of_one_prompt(0)["pass@8"]) == (1.0, 0.0)
    assert passes([[1.0, 0.0]] * 8) == {"pass@1": 0.5, "pass@2": 0.5, "pass@4": 0.5, "pass@8": 0.5}


def test_shares_of_degenerate_completions():
    texts = [(" ", False), ("no no No", False), ("no no yes no", True), ("yes", False)]
    found = degenerate([Completion([1], text, truncated) for text, truncated in texts])
    assert found == {"empty": 0.25, "cut": 0.25, "repeated": 0.25}


def test_a_game_masks_what_the_model_did_not_write():
    tokenizer = make_tokenizer()
    game = Game(Mazes(2).maze(), 0, tokenizer)
    first = tokenizer(f" {game.maze.way[0]}")["input_ids"]
    game.answer([*first, tokenizer.eos_token_id, 5, 5], tokenizer)  # what comes after the end does not count
    assert game.completion[: len(first) + 1] == [*first, tokenizer.eos_token_id]
    assert game.mask == [1] * (len(first) + 1) + [0] * (len(game.completion) - len(first) - 1)
    assert game.maze.passed == 1 and game.view in tokenizer.decode(game.completion)
    game.answer(tokenizer(game.maze.way[1])["input_ids"], tokenizer)
    assert game.view == OVER and game.maze.get_reward() == 1.0
