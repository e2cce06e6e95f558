import json

import pytest

from es_trainer.cli import main
from es_trainer.report import plots


def write_run(folder, reward: float) -> str:
    folder.mkdir(parents=True)
    logs = [{"step": 1, "reward": reward, "reward_min": 0.0, "reward_max": 9.0}, {"step": 1, "eval_reward": reward}]
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": 1, "log_history": logs}))
    return str(folder)


@pytest.fixture
def drawn(monkeypatch):
    """What was drawn."""
    calls = []
    monkeypatch.setattr(
        "es_trainer.cli.plot.plot_rewards", lambda *args: calls.append(args) or plots.plot_rewards(*args)
    )
    return calls


def test_runs_are_named_after_their_folders(tmp_path, drawn, capsys):
    runs = [write_run(tmp_path / "small", 1.0), write_run(tmp_path / "large", 2.0)]
    output = str(tmp_path / "both.png")
    assert main(["plot", *runs, "--output", output]) == 0
    assert (tmp_path / "both.png").read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out == f"Rewards are plotted in {output}.\n"
    ((logs, _),) = drawn
    assert {name: run[0]["reward"] for name, run in logs.items()} == {"small": 1.0, "large": 2.0}


def test_folders_of_the_same_name(tmp_path, drawn, monkeypatch):
    write_run(tmp_path / "a" / "run", 1.0)
    write_run(tmp_path / "b" / "run", 2.0)
    monkeypatch.chdir(tmp_path)
    main(["plot", "a/run", "b/run"])
    assert (tmp_path / "reward.png").is_file()
    assert list(drawn[0][0]) == ["a/run", "b/run"]


def test_the_working_directory(tmp_path, drawn, monkeypatch):
    write_run(tmp_path / "run", 1.0)
    monkeypatch.chdir(tmp_path / "run")
    main(["plot", "."])
    assert list(drawn[0][0]) == ["run"]


def test_no_run(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["plot", str(tmp_path)])
    assert "is not the folder of a run" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["plot"])
    assert "required: RUN" in capsys.readouterr().err
