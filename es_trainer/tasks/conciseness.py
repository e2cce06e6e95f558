import random

from datasets import Dataset

from ..rewards.conciseness import conciseness_reward
from .task import Task


TRAIN_PAIRS = [
    ("What is the capital of France?", "Paris."),
    ("What is the capital of Italy?", "Rome."),
    ("What is the capital of Japan?", "Tokyo."),
    ("What is the capital of Egypt?", "Cairo."),
    ("What is the capital of Canada?", "Ottawa."),
    ("Which ocean is the largest?", "The Pacific Ocean."),
    ("Which planet is closest to the Sun?", "Mercury."),
    ("Which planet has the largest rings?", "Saturn."),
    ("Which animal is the tallest?", "The giraffe."),
    ("Which animal says moo?", "The cow."),
    ("Which metal is liquid at room temperature?", "Mercury."),
    ("Which gas do humans need to breathe?", "Oxygen."),
    ("What is the chemical symbol for gold?", "Au."),
    ("What is frozen water called?", "Ice."),
    ("What is the opposite of hot?", "Cold."),
    ("What is the opposite of left?", "Right."),
    ("What is the past tense of 'go'?", "Went."),
    ("What is the plural of 'mouse'?", "Mice."),
    ("What color do blue and yellow make?", "Green."),
    ("What color is an emerald?", "Green."),
    ("What color is a ripe banana?", "Yellow."),
    ("How many days are in a week?", "Seven."),
    ("How many months are in a year?", "Twelve."),
    ("How many legs does a spider have?", "Eight."),
    ("How many sides does a triangle have?", "Three."),
    ("How many minutes are in an hour?", "Sixty."),
    ("How many continents are there?", "Seven."),
    ("How many players are on a soccer team?", "Eleven."),
    ("What is two plus three?", "Five."),
    ("What is nine minus four?", "Five."),
    ("What is six times seven?", "Forty-two."),
    ("What is half of twenty?", "Ten."),
    ("Who wrote 'Romeo and Juliet'?", "William Shakespeare."),
    ("Who painted the Mona Lisa?", "Leonardo da Vinci."),
    ("Who was the first president of the United States?", "George Washington."),
    ("Who developed the theory of relativity?", "Albert Einstein."),
    ("Is the Earth flat?", "No."),
    ("Is ten greater than two?", "Yes."),
    ("Is a whale a fish?", "No."),
    ("Do penguins live in Antarctica?", "Yes."),
    ("Can ostriches fly?", "No."),
    ("Is the Sun a star?", "Yes."),
    ("What language is spoken in Brazil?", "Portuguese."),
    ("What currency is used in Japan?", "The yen."),
    ("Which month comes after June?", "July."),
    ("Which day comes before Friday?", "Thursday."),
    ("Where do bees live?", "In a hive."),
    ("What do caterpillars turn into?", "Butterflies."),
]
EVAL_PAIRS = [
    ("What is the capital of Spain?", "Madrid."),
    ("What is the capital of Germany?", "Berlin."),
    ("Which planet is known as the Red Planet?", "Mars."),
    ("Which land animal is the fastest?", "The cheetah."),
    ("What is the chemical symbol for iron?", "Fe."),
    ("What is the opposite of up?", "Down."),
    ("What is the plural of 'child'?", "Children."),
    ("What color do red and yellow make?", "Orange."),
    ("How many legs does an insect have?", "Six."),
    ("How many hours are in a day?", "Twenty-four."),
    ("What is three times three?", "Nine."),
    ("Who wrote 'Oliver Twist'?", "Charles Dickens."),
    ("Is ice colder than steam?", "Yes."),
    ("Can fish breathe under water?", "Yes."),
    ("Which month comes after March?", "April."),
    ("What do bees make?", "Honey."),
]


def conciseness(train_size: int | None = None, eval_size: int | None = None, seed: int = 0) -> Task:
    """
    Conciseness: answer short general-knowledge questions in as few words as the reference answer.

    Args:
        train_size (`int` or `None`, *optional*, defaults to `None`):
            Number of training questions. `None` takes all 48.
        eval_size (`int` or `None`, *optional*, defaults to `None`):
            Number of evaluation questions. `None` takes all 16.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the order of the training questions, and so of which ones are taken. Evaluation questions keep
            their order.

    Returns:
        [`Task`]:
            Task with the columns `prompt` (conversational, the question alone) and `answer` (`str`).

    Raises:
        ValueError: If `train_size` or `eval_size` is less than 1 or more than there are questions.
    """
    for name, size, pairs in (("train_size", train_size, TRAIN_PAIRS), ("eval_size", eval_size, EVAL_PAIRS)):
        if size is not None and not 1 <= size <= len(pairs):
            raise ValueError(f"{name}={size} is not possible: use 1 to {len(pairs)}, or None for all questions.")
    shuffled_pairs = random.Random(seed).sample(TRAIN_PAIRS, len(TRAIN_PAIRS))
    return Task(
        "conciseness",
        _dataset(shuffled_pairs[:train_size]),
        _dataset(EVAL_PAIRS[:eval_size]),
        [conciseness_reward],
    )


def _dataset(pairs: list[tuple[str, str]]) -> Dataset:
    return Dataset.from_list(
        [{"prompt": [{"role": "user", "content": question}], "answer": answer} for question, answer in pairs]
    )
