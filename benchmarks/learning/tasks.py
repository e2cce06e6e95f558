"""What the models of the studies learn. Training and held-out prompts have no question in common."""

import random
from typing import Any

from datasets import Dataset

from benchmarks.macro_f1 import accuracy, first_named, macro_f1, messages
from es_trainer.tasks import conciseness

from .mazes import Mazes
from .questions import Questions


HELD_OUT = 64  # prompts
HELD_OUT_SEED = 1 << 20  # seeds of prompts from here on


WORDS = {
    "animal": "dog cow lion eagle salmon spider tiger horse sheep wolf shark whale crow goat "
    "rabbit mouse bear snake duck frog owl camel zebra donkey",
    "fruit": "apple banana cherry pear mango grape lemon orange plum peach melon kiwi fig date "
    "papaya apricot lime raspberry blueberry coconut pineapple strawberry grapefruit tangerine",
    "tool": "hammer saw drill wrench pliers chisel screwdriver axe shovel rake file clamp ladder "
    "crowbar spade hoe sander lathe trowel scissors mallet anvil pickaxe sledgehammer",
    "country": "France Japan Brazil Egypt Canada Italy Spain Peru Chile Kenya India China Norway "
    "Poland Turkey Greece Mexico Ghana Cuba Iran Sweden Portugal Vietnam Morocco",
}
TRAINED = 16  # words of each kind; the other 8 are held out


def kinds(words: slice) -> Dataset:
    """Which of four kinds of things a word is."""
    return Dataset.from_list(
        [
            {
                "prompt": [
                    {
                        "role": "user",
                        "content": f"Is {word} an animal, a fruit, a tool or a country? Answer with one word.",
                    }
                ],
                "answer": kind,
            }
            for kind, listed in WORDS.items()
            for word in listed.split()[words]
        ]
    )


def right_kind(completions: list[Any], answer: list[str], **kwargs) -> list[float]:
    """1 if the first kind that a completion names is the right one, else 0."""
    return [
        float(first_named(completion, WORDS) == right) for completion, right in zip(completions, answer, strict=True)
    ]


def shuffled(dataset: Dataset, seed: int) -> Dataset:
    order = list(range(len(dataset)))
    random.Random(seed).shuffle(order)
    return dataset.select(order)


BRIEF = conciseness()
TASKS: dict[str, Questions | Mazes] = {
    "conciseness": Questions(
        16, lambda seed: shuffled(BRIEF.train_dataset, seed), BRIEF.eval_dataset, tuple(BRIEF.reward_funcs)
    ),
    "kinds": Questions(
        8, lambda seed: shuffled(kinds(slice(TRAINED)), seed), kinds(slice(TRAINED, None)), (right_kind,), True
    ),
    "messages": Questions(
        8, lambda seed: messages(1024, seed << 10), messages(HELD_OUT, HELD_OUT_SEED), (accuracy, macro_f1)
    ),
    **{f"maze-{rooms}": Mazes(rooms) for rooms in (1, 2, 4, 8)},
}


def other_than(task: str) -> Questions:
    """The task that may be forgotten while another one is learned."""
    return TASKS["kinds" if task == "conciseness" else "conciseness"]
