"""The studies: which runs there are, and what differs between them."""

from dataclasses import dataclass, field
from typing import Any


# The same for every study: members are compared by their rewards, so settings depend on the model rather than the task
ES = {
    "population_size": 16,
    "num_prompts_per_step": 8,
    "perturbation": "low_rank",
    "sigma": 0.01,
    "learning_rate": "sigma",
}
GRPO = {"num_generations": 8, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 8, "beta": 0.0}
RATES = [1e-5, 3e-5, 3e-6]


@dataclass(frozen=True)
class Arm:
    """
    Runs that differ by their seeds only.

    Args:
        trainer (`str`):
            `"es"` or `"grpo"`.
        settings (`dict[str, Any]`):
            Fields of the config.
        tuned (`str` or `None`, *optional*):
            The field whose value is chosen.
        choices (`list`, *optional*):
            Its values, which the first seed tries. The best final held-out reward decides.
        tuned_as (`tuple[str, str]` or `None`, *optional*):
            Study and arm whose choice this one takes.
        reward (`str` or `None`, *optional*):
            Name of the reward of the task that is learned from. `None` is the first.
    """

    trainer: str
    settings: dict[str, Any] = field(default_factory=dict)
    tuned: str | None = None
    choices: list[Any] = field(default_factory=list)
    tuned_as: tuple[str, str] | None = None
    reward: str | None = None


@dataclass(frozen=True)
class Study:
    """
    Args:
        task (`str`):
            Name of the task.
        arms (`dict[str, Arm]`):
            Arms by their names.
        seeds (`range`, *optional*):
            Seeds of each arm.
        budgets (`dict[str, int]`, *optional*):
            Completions of a run, by the trainer. ES takes less time for its.
    """

    task: str
    arms: dict[str, Arm]
    seeds: range = range(3)
    budgets: dict[str, int] = field(default_factory=lambda: {"es": 4096, "grpo": 1024})

    def measured(self, trainer: str) -> int:
        """Completions between two measurements."""
        return self.budgets[trainer] // 4


def es(reward: str | None = None, **settings: Any) -> Arm:
    return Arm("es", ES | settings, reward=reward)


def grpo(reward: str | None = None, **settings: Any) -> Arm:
    return Arm("grpo", GRPO | settings, "learning_rate", RATES, reward=reward)


def grpo_as(study: str, **settings: Any) -> Arm:
    """With the learning rate of that study's `grpo`."""
    return Arm("grpo", GRPO | settings, "learning_rate", tuned_as=(study, "grpo"))


# 0.03 of the distance from the start is taken back at each step
ANCHORED = {"anchor_decay": 3.0}
STUDIES = {
    "conciseness": Study(
        "conciseness",
        {
            "es": es(),
            "es-anchor": es(**ANCHORED),
            "es-64": es(population_size=64),
            "grpo": grpo(),
            "grpo-beta": grpo_as("conciseness", beta=0.04),
        },
    ),
    "kinds": Study(
        "kinds",
        {"es": es(), "es-anchor": es(**ANCHORED), "es-64": es(population_size=64), "grpo": grpo()},
    ),
    "messages": Study(
        "messages",
        {"es": es(), "es-macro-f1": es("macro_f1"), "grpo": grpo()},
    ),
    **{
        f"maze-{rooms}": Study(
            f"maze-{rooms}",
            {"es": es(), "grpo": grpo() if rooms == 1 else grpo_as("maze-1")},
            budgets={"es": 2048, "grpo": 512},
        )
        for rooms in (1, 2, 4, 8)
    },
}
