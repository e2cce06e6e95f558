"""Runs side by side, as tables and as curves."""

import json

import pytest
from matplotlib.figure import Figure

from es_trainer.cli import main


SETTINGS = {"population_size": 4, "num_prompts_per_step": 2, "num_generations": 3, "sigma": 0.1, "seed": 0}


def write_run(folder, rewards: list[float], held_out: list[float], **settings) -> str:
    """A run of steps of 1000 tokens and half an hour."""
    folder.mkdir(parents=True)
    lines = [{"config": SETTINGS | settings}]
    for step, reward in enumerate(rewards, 1):
        metrics = {"reward": reward, "num_tokens": 1000 * step, "step_time": 1800.0}
        lines.append({"step": step, "metrics": metrics})
    (folder / "history.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    logs = [{"step": step, "eval_reward": reward} for step, reward in enumerate(held_out)]
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": len(rewards), "log_history": logs}))
    return str(folder)


@pytest.fixture
def lines(monkeypatch):
    """Lines of the last picture, by their labels, and its bands."""
    figures = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **kw: figures.append(self) or save(self, *args, **kw))

    def found() -> tuple[dict, list]:
        (axes,) = figures[-1].axes
        points = {line.get_label(): list(zip(*map(list, line.get_data()), strict=True)) for line in axes.lines}
        bands = [set(map(tuple, band.get_paths()[0].vertices.tolist())) for band in axes.collections]
        return points, bands

    return found


@pytest.mark.parametrize(
    ("axis", "expected"), [("steps", [1, 2]), ("tokens", [1000, 2000]), ("hours", [0.5, 1]), ("completions", [24, 48])]
)
def test_a_metric_over_what_it_cost(tmp_path, lines, axis, expected):
    folder = write_run(tmp_path / "run", [1.0, 3.0], [0.0])
    main(["plot", folder, "--metric", "reward", "--x", axis, "--output", str(tmp_path / "a.png")])
    assert lines() == ({"run": list(zip(expected, [1.0, 3.0], strict=True))}, [])


def test_evaluations_before_and_between_steps(tmp_path, lines):
    folder = write_run(tmp_path / "run", [1.0, 3.0], [0.0, 5.0, 7.0])
    main(["plot", folder, "--metric", "eval_reward", "--x", "tokens", "--output", str(tmp_path / "a.png")])
    assert lines()[0] == {"run": [(0, 0.0), (1000, 5.0), (2000, 7.0)]}


def test_runs_that_differ_by_seed_only_are_a_band(tmp_path, lines):
    folders = [write_run(tmp_path / "a", [1.0, 3.0], []), write_run(tmp_path / "b", [3.0, 3.5, 9.0], [], seed=1)]
    folders.append(write_run(tmp_path / "other", [5.0], [], sigma=0.2))
    main(["plot", *folders, "--metric", "reward", "--output", str(tmp_path / "a.png")])
    points, (band,) = lines()
    assert points == {"a (2 seeds)": [(1, 2.0), (2, 3.25)], "other": [(1, 5.0)]}
    assert {(1, 1.0), (1, 3.0), (2, 3.0), (2, 3.5)} <= band


def test_smoothed_values_are_means_with_those_before(tmp_path, lines):
    folder = write_run(tmp_path / "run", [0.0, 3.0, 6.0, 0.0], [])
    main(["plot", folder, "--smooth", "3", "--output", str(tmp_path / "a.png")])
    assert lines()[0] == {"run": [(1, 0.0), (2, 1.5), (3, 3.0), (4, 3.0)]}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--metric", "f1"], "`metric='f1'` is not valid: no run has logged it. There are: eval_reward, reward"),
        (["--smooth", "0"], "`smooth=0` is not valid"),
        (["--x", "days"], "invalid choice: 'days'"),
    ],
)
def test_what_cannot_be_drawn(tmp_path, capsys, options, said):
    folder = write_run(tmp_path / "run", [1.0], [0.0])
    with pytest.raises(SystemExit):
        main(["plot", folder, *options])
    assert said in capsys.readouterr().err


def test_a_run_without_a_history_does_not_say_how_many_completions_it_made(tmp_path, capsys):
    folder = write_run(tmp_path / "run", [1.0], [0.0])
    (tmp_path / "run" / "history.jsonl").unlink()
    with pytest.raises(SystemExit):
        main(["plot", folder, "--metric", "eval_reward", "--x", "completions"])
    assert "The run 'run' has no history.jsonl" in capsys.readouterr().err


def test_a_table_of_what_differs_and_what_came_of_it(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    write_run(tmp_path / "a", [1.0, 3.0], [0.0, 7.0, 5.0])
    write_run(tmp_path / "b", [2.0], [0.5], sigma=0.2)
    assert main(["compare", "a", "b"]) == 0
    rows = [line.split("│")[1:-1] for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    table = {name.strip(): [cell.strip() for cell in cells] for name, *cells in rows}
    assert table == {
        "sigma": ["0.1", "0.2"],
        "steps": ["2", "1"],
        "held-out: first": ["0", "0.5"],
        "held-out: best": ["7", "0.5"],
        "held-out: last": ["5", "0.5"],
        "reward of members: last": ["3", "2"],
        "tokens": ["2,000", "1,000"],
        "hours": ["1", "0.5"],
    }
