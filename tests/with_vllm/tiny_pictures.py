"""A tiny model that reads images and that vLLM takes."""

import functools
import tempfile
from typing import Any

import tiny
from tiny_vision import Tiny, make_tiny

from es_trainer import ESTrainer
from es_trainer.data import collate


FAMILY = "idefics3"  # vLLM's classes of the others need torchvision, which PyPI has no CPU build of


def make() -> Tiny:
    return make_tiny(FAMILY, **tiny.HEADS)


@functools.cache
def folder() -> str:
    path = tempfile.mkdtemp(prefix="tiny-pictures-")
    for part in make():
        part.save_pretrained(path)
    return path


def answers(run: ESTrainer, rows: list[dict[str, Any]]) -> list[list[int]]:
    prompts = run.engine.tokenize([row["prompt"] for row in collate(rows, "rows")])
    return [completion.ids for completion in run.engine.generate(prompts, seed=0)]
