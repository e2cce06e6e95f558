"""An agent that is a shell script: it finds its model in environment variables, and prints what it was answered."""

import shutil
from pathlib import Path

from datasets import Dataset
from es_trainer import ESConfig, ESTrainer


SCRIPT = Path(__file__).with_name("ask.sh")


def ask(example, endpoint):
    done = endpoint.run(["bash", str(SCRIPT), example["word"]], capture_output=True, text=True, check=True)
    return float(example["word"].upper() in done.stdout)


if shutil.which("curl") is None:
    raise SystemExit("The script needs curl.")
trainer = ESTrainer(
    model="Qwen/Qwen2.5-0.5B-Instruct",
    args=ESConfig(output_dir="Qwen2.5-0.5B-shout", max_completion_length=32, agent_timeout=60.0),
    train_dataset=Dataset.from_dict({"word": ["apple", "river", "cloud", "stone"]}),
    agent_func=ask,
)
trainer.train()
trainer.save_model()
