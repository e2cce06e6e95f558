"""
A game of up to ten turns with a reward at its end only: the number is guessed, and the environment answers whether it
is larger or smaller.
"""

import random

from datasets import Dataset
from es_trainer import ESConfig, ESTrainer


class GuessTheNumber:
    """Guess a number from 1 to 100."""

    def reset(self, seed: int, **row) -> str:
        self.number = random.Random(seed).randint(1, 100)
        self.turns = 0
        self.found = False
        return "I think of a number from 1 to 100. Guess it in at most ten turns."

    def guess(self, number: int) -> str:
        """
        Guesses the number.

        Args:
            number: The guess, from 1 to 100.

        Returns:
            Whether the number is larger or smaller.
        """
        if self.found or self.turns == 10:
            return "The game is over."
        self.turns += 1
        self.found = number == self.number
        if self.found:
            return "That is it!"
        return "It is larger." if number < self.number else "It is smaller."

    def get_reward(self) -> float:
        return 1.0 - 0.05 * self.turns if self.found else 0.0


dataset = Dataset.from_list([{"prompt": [{"role": "user", "content": ""}], "seed": seed} for seed in range(256)])
trainer = ESTrainer(
    model="Qwen/Qwen2.5-0.5B-Instruct",
    args=ESConfig(output_dir="Qwen2.5-0.5B-guess", max_completion_length=1024, max_tool_calling_iterations=10),
    train_dataset=dataset,
    environment_factory=GuessTheNumber,
)
trainer.train()
trainer.save_model()
