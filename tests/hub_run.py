"""Training runs that push to a Hub: `hub_run.py RUNS`, where RUNS is a JSON list of `Run`s."""

import json
import logging
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from conftest import TINY_RUN, letters, make_model, make_tokenizer
from datasets import Dataset
from huggingface_hub import ModelCard, hf_hub_download, snapshot_download
from huggingface_hub.errors import RepositoryNotFoundError
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from es_trainer import ESConfig, ESTrainer, replay


BASE = "user/base"


@dataclass
class Run:
    """A run, and the arguments of the push at its end."""

    output_dir: str
    config: dict[str, Any] = field(default_factory=dict)
    push: dict[str, Any] = field(default_factory=dict)
    wait: bool = True  # for each push, so that none is left out because another is under way


class Wait(TrainerCallback):
    def __init__(self, trainer: ESTrainer):
        self.trainer = trainer

    def on_save(self, *_: Any, **__: Any) -> None:
        if self.trainer.push_in_progress is not None:
            self.trainer.push_in_progress.wait_until_done()


def train(run: Run) -> ESTrainer:
    dataset = Dataset.from_dict({"prompt": [f"Say {word}" for word in "one two three four".split()]})
    args = ESConfig(run.output_dir, **{**TINY_RUN, "push_to_hub": True, **run.config})
    trainer = ESTrainer(BASE, letters, args, dataset)
    if run.wait:
        trainer.add_callback(Wait(trainer))
    trainer.train()
    trainer.push_to_hub(**run.push)
    return trainer


def visit(name: str, folder: Path) -> dict[str, Any]:
    """Load what is on the Hub, as its users do."""
    AutoModelForCausalLM.from_pretrained(name).save_pretrained(folder / "loaded")
    AutoTokenizer.from_pretrained(name).save_pretrained(folder / "loaded")
    replay(BASE, hf_hub_download(name, "history.jsonl")).save_pretrained(folder / "replayed")
    snapshot_download(name, local_dir=folder / "snapshot")
    card = ModelCard.load(name)
    return {"name": name, "public": is_public(name, folder / "cache"), "card": card.data.to_dict(), "text": card.text}


def is_public(name: str, cache: Path) -> bool:
    try:
        hf_hub_download(name, "config.json", cache_dir=cache, token=False)
    except RepositoryNotFoundError:
        return False
    return True


if __name__ == "__main__":
    make_model().push_to_hub(BASE)
    make_tokenizer().push_to_hub(BASE)
    for options in json.loads(sys.argv[1]):
        folder = Path(options["output_dir"])
        record: dict[str, Any] = {"error": None}
        folder.parent.mkdir(parents=True, exist_ok=True)
        log = logging.FileHandler(f"{folder}.log")
        logging.getLogger("es_trainer").addHandler(log)
        try:
            record |= visit(train(Run(**options)).hub_model_id, folder)
        except Exception as error:
            record["error"] = f"{type(error).__name__}: {error}"
        logging.getLogger("es_trainer").removeHandler(log)
        Path(f"{folder}.json").write_text(json.dumps(record))
