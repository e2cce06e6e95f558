"""The studies: which runs there are, and what differs between them."""

from dataclasses import dataclass, field, replace
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
STEPS = [0.01, 0.02, 0.005]
RATES = [1e-5, 3e-5, 1e-4]


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
        start (`str`, *optional*, defaults to `"as it is"`):
            Name of the model that it begins with.
    """

    trainer: str
    settings: dict[str, Any] = field(default_factory=dict)
    tuned: str | None = None
    choices: list[Any] = field(default_factory=list)
    tuned_as: tuple[str, str] | None = None
    reward: str | None = None
    start: str = "as it is"


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
        measurements (`int`, *optional*, defaults to `4`):
            How often a run is measured, beside the start.
        samples (`bool`, *optional*, defaults to `True`):
            Whether the start and the end are measured by samples, too, for pass@k.
    """

    task: str
    arms: dict[str, Arm]
    seeds: range = range(3)
    budgets: dict[str, int] = field(default_factory=lambda: {"es": 4096, "grpo": 1024})
    measurements: int = 4
    samples: bool = True

    def measured(self, trainer: str) -> int:
        """Completions between two measurements."""
        return self.budgets[trainer] // self.measurements


def completions_of_a_step(settings: dict[str, Any]) -> int:
    """Of the settings of an arm."""
    if "population_size" in settings:
        return settings["population_size"] * settings["num_prompts_per_step"]
    return settings["per_device_train_batch_size"] * settings["gradient_accumulation_steps"]


def es(**settings: Any) -> Arm:
    return Arm("es", ES | settings)


def grpo(*other_rates: float) -> Arm:
    return Arm("grpo", GRPO, "learning_rate", [*RATES, *other_rates])


def grpo_as(study: str, **settings: Any) -> Arm:
    """With the learning rate of that study's `grpo`."""
    return Arm("grpo", GRPO | settings, "learning_rate", tuned_as=(study, "grpo"))


def variant(scale: float = 1.0, **settings: Any) -> Arm:
    """
    With a learning rate of its own: what makes updates longer would look better or worse by that alone. `scale` makes
    a run go about as far as with 16 members and z-scores.
    """
    return Arm("es", ES | settings, "learning_rate", [rate * scale for rate in STEPS])


# 0.03 of the distance from the start is taken back at each step
ANCHORED = {"anchor_decay": 3.0}
AS_LONG = {"es": 4096, "grpo": 512}  # completions in about as many seconds
STUDIES = {
    "conciseness": Study(
        "conciseness",
        {
            "es": es(),
            "es-anchor": es(**ANCHORED),
            "es-64": es(population_size=64),
            "grpo": grpo(3e-6, 3e-4),
            "grpo-beta": grpo_as("conciseness", beta=0.04),
        },
        budgets=AS_LONG,
    ),
    "kinds": Study(
        "kinds",
        {"es": es(), "es-anchor": es(**ANCHORED), "es-64": es(population_size=64), "grpo": grpo(3e-6)},
    ),
    "messages": Study(
        "messages",
        {"es": es(), "es-macro-f1": replace(es(), reward="macro_f1"), "grpo": grpo(3e-6)},
        budgets=AS_LONG,
    ),
    **{
        f"maze-{rooms}": Study(
            f"maze-{rooms}",
            {"es": es(), "grpo": grpo() if rooms == 2 else grpo_as("maze-2")},
            budgets={"es": 1024, "grpo": 256},
        )
        for rooms in (1, 2, 4, 8)
    },
    "spread": Study(
        "kinds",
        {
            "es": es(),
            "es-sft": replace(es(), start="sft"),
            "es-lora": replace(es(), start="lora", tuned="sigma", choices=[0.01, 0.03, 0.1]),
            "grpo": grpo_as("kinds"),
            "grpo-sft": replace(grpo_as("kinds"), start="sft"),
            "grpo-lora": replace(grpo(), start="lora", choices=[1e-4, 3e-4, 1e-3, 3e-3]),
        },
        seeds=range(5),
        budgets={"es": 2048, "grpo": 512},
        measurements=1,
        samples=False,
    ),
    "variants": Study(
        "kinds",
        {
            "rank 1, N 16, z-scores": variant(),
            "sigma 0.02": variant(sigma=0.02),
            "rank 4": variant(perturbation_rank=4),
            "gaussian": variant(perturbation="gaussian"),
            # With as many completions, half as many steps, which are shorter by sqrt(2)
            "N 32": variant(2.0, population_size=32),
            "N 64": variant(4.0, population_size=64),
            "N 128": variant(8.0, population_size=128),
            "antithetic": variant(antithetic=True),
            # Ranks in [-0.5, 0.5] deviate by 1 / sqrt(12); prompts that disagree make fitness smaller
            "ranks": variant(12**0.5, fitness_shaping="centered_rank"),
            "prompt-centred": variant(2.0, fitness_shaping="prompt_centered"),
            # The first step of Adam changes each weight by the learning rate, that of 16 z-scores by a quarter of it.
            # Higher ones than these gained less, so that a sixteenth is in the middle here
            "adam": variant(0.0625, es_optimizer="adam"),
        },
        budgets={"es": 2048},
        measurements=1,
        samples=False,
    ),
}
