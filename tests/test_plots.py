import json

import pytest
from matplotlib.figure import Figure

from es_trainer.report.plots import plot_rewards, read_run


def logged(step: int, reward: float) -> dict:
    return {"step": step, "reward": reward, "reward_min": reward - 1, "reward_max": reward + 2, "loss": -reward}


MEMBERS = [logged(1, 0.0), logged(2, 0.5), logged(3, 1.0)]
HELD_OUT = [{"step": 0, "eval_reward": 0.1, "eval_reward_std": 9.0}, {"step": 2, "eval_reward": 0.4}]


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """Draw, and return what lines and bands the picture has."""
    figures = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *args, **kwargs: figures.append(self) or save(self, *args, **kwargs)
    )

    def draw(runs: dict) -> tuple[dict, list]:
        plot_rewards(runs, tmp_path / "new" / "reward.png")
        assert (tmp_path / "new" / "reward.png").read_bytes().startswith(b"\x89PNG")
        (axes,) = figures[-1].axes
        named = [text.get_text() for text in axes.get_legend().get_texts()] if axes.get_legend() else []
        assert named == [line.get_label() for line in axes.lines]
        bands = [band.get_paths()[0].vertices for band in axes.collections if band.get_paths()]
        return {line.get_label(): line for line in axes.lines}, bands

    return draw


def points(line) -> list[tuple[float, float]]:
    return list(zip(*map(list, line.get_data()), strict=True))


def test_members_and_held_out_prompts(drawn):
    lines, bands = drawn({"run": [*MEMBERS, *HELD_OUT]})
    assert points(lines["run: members (mean, range)"]) == [(1, 0.0), (2, 0.5), (3, 1.0)]
    assert points(lines["run: held-out"]) == [(0, 0.1), (2, 0.4)]
    assert lines["run: held-out"].get_linestyle() == "--"
    assert len(lines) == 2
    (band,) = bands
    assert {(1, -1.0), (2, -0.5), (3, 0.0), (1, 2.0), (2, 2.5), (3, 3.0)} <= set(map(tuple, band.tolist()))


def test_several_runs_have_colors_of_their_own(drawn):
    lines, bands = drawn({"one": [*MEMBERS, *HELD_OUT], "two": MEMBERS[:2]})
    one, held_out, two = lines.values()
    assert one.get_color() == held_out.get_color() != two.get_color()
    assert points(two) == [(1, 0.0), (2, 0.5)]
    assert len(bands) == 2


def test_several_sets_of_held_out_prompts(drawn):
    lines, _ = drawn(
        {"run": [{"step": 1, "eval_easy_reward": 1.0, "eval_hard_reward": 0.0, "eval_rewards/a/mean": 9.0}]}
    )
    assert points(lines["run: held-out easy"]) == [(1, 1.0)]
    assert points(lines["run: held-out hard"]) == [(1, 0.0)]
    assert lines["run: held-out easy"].get_marker() != lines["run: held-out hard"].get_marker()


def test_values_that_are_none_are_left_out(drawn):
    unknown = {"step": 2, "reward": None, "reward_min": None, "reward_max": None, "eval_reward": None}
    lines, _ = drawn({"run": [MEMBERS[0], unknown, MEMBERS[2]]})
    assert points(lines["run: members (mean, range)"]) == [(1, 0.0), (3, 1.0)]
    assert len(lines) == 1


def test_nothing_to_draw(drawn):
    assert drawn({"run": []}) == ({}, [])


def test_the_suffix_says_in_which_format(tmp_path):
    plot_rewards({"run": MEMBERS}, tmp_path / "reward.pdf")
    assert (tmp_path / "reward.pdf").read_bytes().startswith(b"%PDF")


# ---- reading ----


def write_state(folder, *logs: dict) -> None:
    folder.mkdir(exist_ok=True)
    state = {"global_step": max(log["step"] for log in logs), "log_history": list(logs)}
    (folder / "trainer_state.json").write_text(json.dumps(state))


def write_history(folder, *steps: dict) -> None:
    folder.mkdir(exist_ok=True)
    lines = [{"config": {}}, *({"step": log["step"], "seeds": [1], "metrics": log} for log in steps)]
    (folder / "history.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_the_state_alone(tmp_path):
    write_state(tmp_path, MEMBERS[1], *HELD_OUT)
    assert read_run(tmp_path) == [MEMBERS[1], *HELD_OUT]


def test_the_newest_checkpoint(tmp_path):
    write_state(tmp_path / "checkpoint-10", logged(10, 1.0))
    write_state(tmp_path / "checkpoint-9", logged(9, 0.0))
    assert read_run(tmp_path) == [logged(10, 1.0)]
    assert read_run(tmp_path / "checkpoint-9") == [logged(9, 0.0)]


def test_the_history_has_more_steps(tmp_path):
    write_state(tmp_path / "checkpoint-2", MEMBERS[1], *HELD_OUT)
    write_history(tmp_path / "checkpoint-2", *MEMBERS[:2])
    assert read_run(tmp_path) == [*MEMBERS[:2], *HELD_OUT]
    write_history(tmp_path, *MEMBERS)
    assert read_run(tmp_path) == [*MEMBERS, *HELD_OUT]


def test_the_history_alone(tmp_path):
    write_history(tmp_path, *MEMBERS)
    assert read_run(tmp_path) == MEMBERS


def test_what_an_earlier_run_left_in_the_folder(tmp_path):
    write_state(tmp_path / "checkpoint-5", logged(5, 9.0), {"step": 5, "eval_reward": 9.0}, HELD_OUT[0])
    write_history(tmp_path / "checkpoint-5", *MEMBERS, logged(4, 9.0), logged(5, 9.0))
    write_history(tmp_path, *MEMBERS)
    assert read_run(tmp_path) == [*MEMBERS, HELD_OUT[0]]


def test_before_the_first_step(tmp_path):
    write_history(tmp_path)
    assert read_run(tmp_path) == []


def test_a_folder_without_a_run(tmp_path):
    with pytest.raises(FileNotFoundError, match="is not the folder of a run"):
        read_run(tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        read_run(tmp_path / "nowhere")
