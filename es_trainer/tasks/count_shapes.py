import random
from collections.abc import Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any

from datasets import Dataset

from ..rewards.count import count_reward
from .task import Task


if TYPE_CHECKING:
    from PIL.Image import Image


COLORS = {"red": (220, 40, 40), "green": (40, 160, 60), "blue": (40, 80, 220), "yellow": (240, 200, 30)}
SHAPES = ("circle", "square", "triangle")
KINDS = [(color, shape) for color in COLORS for shape in SHAPES]
CELLS = 4  # in a row and in a column of the picture; each has one shape at most
CELL = 56  # pixels
LARGEST_COUNT = 5
MOST_OTHERS = 6

PROMPT = "How many {color} {shape}s are in the picture? Answer with the number alone."

# What is drawn: color, shape, left and upper edge and size in pixels
Drawn = tuple[str, str, int, int, int]


def count_shapes(train_size: int = 200, eval_size: int = 100, seed: int = 0) -> Task:
    """
    Count shapes: how many shapes of one color and form are in a picture, which has others, too. For models that read
    images. No two pictures of the task, in either split, are the same. Needs `pip install 'es-trainer[images]'`.

    Args:
        train_size (`int`, *optional*, defaults to `200`):
            Number of training pictures.
        eval_size (`int`, *optional*, defaults to `100`):
            Number of evaluation pictures. They depend on `eval_size` and `seed` alone, so that runs with different
            `train_size` can be compared.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the pictures.

    Returns:
        [`Task`]:
            Task with the columns `prompt` (conversational), `image` (224 x 224 pixels) and `count` (`int`, 0 to 5).
            The reward is 1.0 for the number alone, and 0.0 for anything else.

    Raises:
        ImportError: If Pillow is not installed.
        ValueError: If `train_size` or `eval_size` is less than 1.
    """
    for name, size in (("train_size", train_size), ("eval_size", eval_size)):
        if size < 1:
            raise ValueError(f"{name}={size} leaves the split without a picture: {name} must be 1 or more.")
    rows = _distinct_rows(random.Random(seed))
    eval_rows = list(islice(rows, eval_size))
    train_rows = list(islice(rows, train_size))
    return Task("count_shapes", Dataset.from_list(train_rows), Dataset.from_list(eval_rows), [count_reward])


def _distinct_rows(rng: random.Random) -> Iterator[dict[str, Any]]:
    """Endless stream of rows with different pictures."""
    seen: set[tuple[Drawn, ...]] = set()
    while True:
        color, shape = rng.choice(KINDS)
        count = rng.randint(0, LARGEST_COUNT)
        others = [kind for kind in KINDS if kind != (color, shape)]
        kinds = [(color, shape)] * count + rng.choices(others, k=rng.randint(1, MOST_OTHERS))
        drawn = tuple(map(_placed, kinds, rng.sample(range(CELLS**2), len(kinds)), [rng] * len(kinds)))
        if drawn not in seen:
            seen.add(drawn)
            question = PROMPT.format(color=color, shape=shape)
            yield {"prompt": [{"role": "user", "content": question}], "image": draw(drawn), "count": count}


def _placed(kind: tuple[str, str], cell: int, rng: random.Random) -> Drawn:
    """A shape of a kind somewhere in a cell."""
    row, column = divmod(cell, CELLS)
    size = rng.randint(CELL // 2, CELL - 4)
    x, y = (CELL * place + rng.randint(1, CELL - size - 2) for place in (column, row))
    return (*kind, x, y, size)


def draw(shapes: tuple[Drawn, ...]) -> "Image":
    """A picture of shapes on white."""
    try:
        from PIL import Image, ImageDraw
    except ImportError as error:
        raise ImportError("The task `count_shapes` draws with Pillow: pip install 'es-trainer[images]'.") from error

    picture = Image.new("RGB", (CELLS * CELL, CELLS * CELL), "white")
    pen = ImageDraw.Draw(picture)
    for color, shape, x, y, size in shapes:
        box = (x, y, x + size, y + size)
        if shape == "circle":
            pen.ellipse(box, fill=COLORS[color])
        elif shape == "square":
            pen.rectangle(box, fill=COLORS[color])
        else:
            pen.polygon([(x, y + size), (x + size, y + size), (x + size // 2, y)], fill=COLORS[color])
    return picture
