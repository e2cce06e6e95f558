"""`python -m benchmarks.learning`: its runs, with a tiny model, and the page with its tables."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import make_tokenizer, save_tiny
from safetensors.torch import load_file

from benchmarks.learning import figures, judge, one_run, results, sections, starts
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


@pytest.mark.parametrize("trainer", ["es", "grpo"])
@pytest.mark.parametrize("measured", [0, 1])
def test_a_run_that_was_interrupted_goes_on_as_if_it_had_not_been(tiny, monkeypatch, trainer, measured):
    def measurements(run: dict) -> list[dict]:
        return [{key: entry[key] for key in entry if key not in ("seconds", "peak_mib")} for entry in run["history"]]

    following = pending(["conciseness"], [trainer])
    path = results.path_of(*following)
    one_run.run(*following)
    uninterrupted = results.read(path)
    path.unlink()
    measure = judge.Judge.measure

    def interrupt(*args, **kwargs):
        if path.exists() and len(results.read(path)["history"]) > measured:
            raise KeyboardInterrupt
        return measure(*args, **kwargs)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(judge.Judge, "measure", interrupt)
        one_run.run(*following)
    before = results.read(path)
    assert len(before["history"]) == 1 + measured and not before["done"]
    assert pending(["conciseness"], [trainer]) == following
    one_run.run(*following)
    after = results.read(path)
    assert measurements(after) == measurements(uninterrupted) and after["done"]
    assert after["history"][measured]["seconds"] == before["history"][measured]["seconds"]
    assert list(path.parent.iterdir()) == [path], "checkpoints are gone"


@pytest.mark.parametrize("trainer", ["es", "grpo"])
def test_games_are_played_by_both_trainers(tiny, monkeypatch, trainer):
    study = replace(STUDIES["maze-2"], budgets={"es": 128, "grpo": 64})
    monkeypatch.setitem(STUDIES, "maze-2", study)
    one_run.run("maze-2", trainer, 0, 1e-3)
    before, after = results.read(results.path_of("maze-2", trainer, 0, 1e-3))["history"]
    assert after["completions"] == study.budgets[trainer] and after["seconds"] > before["seconds"]
    assert 0.0 <= after["rooms"] <= 2.0


@pytest.mark.parametrize("start", list(starts.STARTS))
def test_runs_begin_with_any_start(tiny, tmp_path, monkeypatch, start):
    monkeypatch.setattr(starts, "TUNED", tmp_path / "sft-model")
    study = replace(STUDIES["spread"], task="conciseness", budgets={"es": 256}, measurements=1)
    monkeypatch.setitem(STUDIES, "spread", study)
    monkeypatch.setitem(STUDIES["spread"].arms, "es", replace(STUDIES["spread"].arms["es"], start=start))
    one_run.run("spread", "es", 0, None)
    before, after = results.read(results.path_of("spread", "es", 0, None))["history"]
    assert after["texts_nll"] != before["texts_nll"]


def test_supervised_fine_tuning_is_done_once(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(starts, "TUNED", tmp_path / "sft-model")
    folder = starts.after_sft()["model"]
    tuned = load_file(Path(folder) / "model.safetensors")
    before = load_file(Path(starts.smollm2()) / "model.safetensors")
    assert any(not torch.equal(tuned[name], before[name].to(tuned[name].dtype)) for name in tuned)
    monkeypatch.setattr(starts, "SFTTrainer", None)
    assert starts.after_sft()["model"] == folder


def test_the_best_choice_of_the_first_seed_is_run_with_the_others(tiny):
    grpo = STUDIES["conciseness"].arms["grpo"]
    best = grpo.choices[1]
    for choice in grpo.choices:
        assert pending(["conciseness"], ["grpo"]) == ("conciseness", "grpo", 0, choice)
        path = results.path_of("conciseness", "grpo", 0, choice)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"done": False}))  # of a run that was killed, which begins again
        assert pending(["conciseness"], ["grpo"])[3] == choice
        path.write_text(
            json.dumps({"done": True, "history": [{"conciseness_reward": 0.9 if choice == best else 0.3}]})
        )
    assert pending(["conciseness"], ["grpo"]) == ("conciseness", "grpo", 1, best)


def test_among_choices_that_end_alike_the_one_that_learns_soonest_is_the_best(written):
    slow, fast, *others = STUDIES["conciseness"].arms["grpo"].choices
    for choice, rewards in {slow: (-60, -50, -5), fast: (-60, -6, -5), **dict.fromkeys(others, (-60, -1, -6))}.items():
        written("conciseness", "grpo", [{"conciseness_reward": reward} for reward in rewards], choice=choice)
    assert results.best_choice("conciseness", "grpo") == fast


def test_the_pages_have_the_tables_and_pictures_of_the_runs():
    for page, text in figures.pages().items():
        assert page.read_text() == text, "run `python -m benchmarks.learning --draw`"
    drawn = [name for name, section in sections.SECTIONS.items() if section.runs()]
    assert drawn and all((figures.DOCS / "results" / f"{name}.png").exists() for name in drawn)


@pytest.fixture
def written(tmp_path, monkeypatch):
    """Writes runs of a study, with a history each."""
    monkeypatch.setattr(results, "RESULTS", tmp_path)

    def write(study: str, arm: str, *histories: list[dict], choice=None) -> None:
        about = {"done": True, "task": STUDIES[study].task, "settings": STUDIES[study].arms[arm].settings}
        for seed, history in enumerate(histories):
            path = results.path_of(study, arm, seed, choice)
            path.parent.mkdir(exist_ok=True)
            settings = about["settings"] | {"learning_rate": choice or 0.01}
            path.write_text(json.dumps(about | {"settings": settings, "history": history}))

    return write


def measured(completions: int, **found: float) -> dict[str, float]:
    return {"completions": completions, "seconds": completions / 10, "peak_mib": 100.0, "texts_nll": 3.0, **found}


@pytest.fixture
def table_of(tmp_path):
    """The tables of a section, of which the picture is drawn, too."""

    def table_of(name: str) -> str:
        section, picture = sections.SECTIONS[name], tmp_path / "section.png"
        runs = section.runs()
        section.picture(runs, picture)
        assert picture.stat().st_size > 10_000
        return section.table(runs)

    return table_of


def cells(table: str, run: str) -> dict[str, str]:
    """The row of a run."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    return next(dict(zip(lines[0], line, strict=True)) for line in lines if line[0] == run)


def test_the_table_of_a_study_compares_at_equal_completions_and_at_equal_seconds(written, table_of):
    def run(*rewards: float, every: int) -> list[dict]:
        return [
            measured(step * every, conciseness_reward=reward, kl=0.0, **{"share/cut": 0.5})
            for step, reward in enumerate(rewards)
        ]

    written("conciseness", "es", *(run(-60.0, end, every=1024) for end in (-40.0, -20.0, -30.0)))
    worse, best, *others = STUDIES["conciseness"].arms["grpo"].choices
    for choice, end in {worse: -50.0, best: -20.0, **dict.fromkeys(others, -40.0)}.items():
        written("conciseness", "grpo", run(-60.0, end, every=512), choice=choice)
    es, grpo = (cells(table_of("conciseness"), name) for name in ("es", "grpo"))
    assert (es["seeds"], grpo["seeds"]) == ("3", "1")
    assert es["at the end"] == "-30 (-40 to -20)" and grpo["at the end"] == "-20", "the best learning rate"
    assert es["after 512 completions"] == "-45 (-50 to -40)" and grpo["after 512 completions"] == "-20"
    assert es["after 51 s"] == "-45 (-50 to -40)", "both run 10 completions a second"


def test_the_table_of_seeds_has_their_standard_deviation(written, table_of):
    ends = (0.5, 0.6, 0.7, 0.8, 0.9)
    written("spread", "es", *([measured(0, right_kind=0.25), measured(2048, right_kind=end, kl=1.0)] for end in ends))
    row = cells(table_of("spread"), "es")
    assert (row["completions"], row["seconds"], row["peak MiB"]) == ("2048", "205", "100")
    assert row["mean"] == "0.700"
    assert row["standard deviation"] == "0.158", "the root of the sum of squares, 0.1, over 4"


def test_the_table_of_mazes_has_a_row_for_each_horizon_and_trainer(written, table_of):
    for rooms, end in ((1, 1.0), (8, 0.5)):
        written(f"maze-{rooms}", "es", [measured(n, won=won, rooms=4 * won) for n, won in ((0, 0.25), (1024, end))])
    table = table_of("mazes")
    assert cells(table, "es, rooms: 1")["won"] == "1"
    row = cells(table, "es, rooms: 8")
    assert (row["won before"], row["won"], row["rooms passed"], row["games"]) == ("0.25", "0.5", "2", "1024")


def test_the_table_of_variants_has_gains_at_the_learning_rate_that_was_chosen(written, table_of):
    for arm in ("gaussian", "N 64"):
        for choice, end in zip(STUDIES["variants"].arms[arm].choices, (0.5, 0.75, 0.25), strict=True):
            written(
                "variants",
                arm,
                [measured(n, right_kind=right, kl=1.0) for n, right in ((0, 0.25), (2048, end))],
                choice=choice,
            )
    table = table_of("variants")
    row = cells(table, "gaussian")
    assert (row["learning rate"], row["gain"], row["steps"]) == ("0.02", "0.5", "16")
    row = cells(table, "N 64")
    assert (row["learning rate"], row["gain"], row["steps"]) == ("0.08", "0.5", "4")


def test_the_table_of_forgetting_has_what_was_not_learned(written, table_of):
    history = [
        measured(n, right_kind=right, texts_nll=nll, **{"other/conciseness_reward": other})
        for n, right, nll, other in ((0, 0.25, 3.0, -60.0), (1024, 0.5, 3.5, -64.0), (4096, 0.75, 4.0, -70.0))
    ]
    written("kinds", "es", history)
    row = cells(table_of("forgetting"), "kinds, es")
    assert (row["learned before"], row["learned"]) == ("0.25", "0.75")
    assert (row["other task before"], row["after 512 completions"], row["at the end"]) == ("-60", "-62", "-70")
    assert (row["nats after 512 completions"], row["nats at the end"]) == ("3.25", "4")


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
