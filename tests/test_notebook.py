"""A run in a real notebook."""

import json
import re
from pathlib import Path

import nbformat
from nbclient import NotebookClient


CELLS = [
    """
    import sys

    sys.path.insert(0, {tests!r})
    from conftest import TINY_RUN, make_model, make_tokenizer
    from datasets import Dataset

    from es_trainer import ESConfig, ESTrainer
    """,
    """
    import os

    trainer_process = os.getpid()


    def letters(completions, log_metric, **kwargs):
        log_metric("own/elsewhere", os.getpid() != trainer_process)
        return [sum(letter.islower() for letter in text) for text in completions]


    numbers = Dataset.from_dict({{"prompt": ["Say one", "Say two", "Say three", "Say four"]}})
    options = TINY_RUN | {{"disable_tqdm": False, "max_steps": 2, "eval_strategy": "steps", "eval_steps": 2}}
    args = ESConfig(output_dir={output!r}, reward_workers=2, **options)
    trainer = ESTrainer(
        make_model(), letters, args, train_dataset=numbers, eval_dataset=numbers, processing_class=make_tokenizer()
    )
    trainer.train();
    """,
    """
    import json

    logs = [log for log in trainer.state.log_history if "step_time" in log or "eval_reward" in log]
    print(json.dumps(logs))
    """,
]


def test_a_notebook_shows_a_table_of_rewards_and_its_functions_run_in_workers(tmp_path):
    of_files = {"tests": str(Path(__file__).parent), "output": str(tmp_path / "run")}
    cells = [nbformat.v4.new_code_cell(re.sub(r"^    ", "", cell.format(**of_files), flags=re.M)) for cell in CELLS]
    notebook = nbformat.v4.new_notebook(cells=cells)
    NotebookClient(notebook, timeout=600, kernel_name="python3").execute()
    first, second, held_out = json.loads(cells[2].outputs[0].text)
    assert first["own/elsewhere"] == 1.0

    html = "".join(output.data.get("text/html", "") for output in cells[1].outputs if "data" in output)
    head, *rows = (re.findall(r"<t[hd]>(.*?)</t[hd]>", row) for row in html.split("<tr")[1:])
    assert head == ["Step", "Reward", "Spread", "Signal", "Seconds", "Held-out"]
    figures = [
        [f"{log[key]:.4g}" for key in ("reward", "reward_std", "signal", "step_time")] for log in (first, second)
    ]
    assert rows == [["1", *figures[0]], ["2", *figures[1], f"{held_out['eval_reward']:.4g}"]]
