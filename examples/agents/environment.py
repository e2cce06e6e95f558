"""
A game of up to ten turns with a reward at its end only: a maze. Each room has one door that is not locked, and a sign
that names it.
"""

import random

from datasets import Dataset
from es_trainer import ESConfig, ESTrainer


PROMPT = "You are in a maze. Find the way out in at most ten turns. "
DIRECTIONS = ("north", "east", "south", "west")


class Maze:
    """A maze of eight rooms. Signs tell the way."""

    rooms, turns = 8, 10

    def reset(self, seed: int, **row) -> str:
        self.random = random.Random(seed)
        self.way = self.random.choices(DIRECTIONS, k=self.rooms)
        self.passed = 0
        self.turn = 0
        return self._view()

    def _view(self) -> str:
        """What is seen in this room: three doors, and the sign."""
        others = [direction for direction in DIRECTIONS if direction != self.way[self.passed]]
        doors = [self.way[self.passed], *self.random.sample(others, 2)]
        self.random.shuffle(doors)
        return (
            f"Doors lead {doors[0]}, {doors[1]} and {doors[2]}. A sign says that the exit is "
            f"{self.way[self.passed]}. Which way do you go?"
        )

    def go(self, direction: str) -> str:
        """
        Go through a door.

        Args:
            direction: north, east, south or west.

        Returns:
            What is seen then. Only one door of a room is not locked.
        """
        if self._is_over():
            return "The game is over."
        self.turn += 1
        self.passed += direction == self.way[self.passed]
        return "The game is over." if self._is_over() else self._view()

    def _is_over(self) -> bool:
        return self.passed == self.rooms or self.turn == self.turns

    def get_reward(self) -> float:
        return float(self.passed == self.rooms)


if __name__ == "__main__":
    prompt = [{"role": "user", "content": PROMPT}]
    trainer = ESTrainer(
        model="Qwen/Qwen2.5-0.5B-Instruct",
        args=ESConfig(output_dir="Qwen2.5-0.5B-maze", max_completion_length=1024, max_tool_calling_iterations=10),
        train_dataset=Dataset.from_list([{"prompt": prompt, "seed": seed} for seed in range(256)]),
        environment_factory=Maze,
    )
    trainer.train()
    trainer.save_model()
