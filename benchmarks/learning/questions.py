"""Tasks of questions that are answered in one turn."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from es_trainer.backends.drift import kl_divergence
from es_trainer.evolution.generations import pass_at, tries
from es_trainer.rollout import Completion

from .judge import Judge


SAMPLES = 8  # completions of each prompt for pass@k


@dataclass(frozen=True)
class Questions:
    """
    Args:
        tokens (`int`):
            Most tokens of a completion.
        dataset (`Callable`):
            Returns the prompts to train on for a seed.
        held_out (`Dataset`):
            Prompts that are never trained on.
        rewards (`tuple[Callable, ...]`):
            Reward functions. All are measured. Runs are rewarded by the first, or by the one that their arm names.
        graded (`bool`, *optional*, defaults to `False`):
            Whether completions are right or wrong, so that there is a pass@k.
    """

    tokens: int
    dataset: Callable[[int], Dataset]
    held_out: Dataset
    rewards: tuple[Callable[..., Any], ...]
    graded: bool = False

    @property
    def metric(self) -> str:
        """What runs are compared by."""
        return self.rewards[0].__name__

    def inputs(self, trainer: str, seed: int, reward: str | None) -> dict[str, Any]:
        """Arguments of the trainer."""
        named = {function.__name__: function for function in self.rewards}
        return {"reward_funcs": named[reward or self.metric], "train_dataset": self.dataset(seed)}

    def measure(
        self, judge: Judge, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, samples: bool
    ) -> dict[str, float]:
        """
        Args:
            judge ([`Judge`]):
                Has the model of the start.
            model ([`~transformers.PreTrainedModel`]):
                With the weights to measure.
            tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
                Its tokenizer.
            samples (`bool`):
                Whether to sample completions, too, for pass@k.

        Returns:
            `dict[str, float]`: Mean of each reward over greedy completions; shares of completions that are empty, cut
            at the most tokens, or repeat a word; `kl`: KL(now || start) of next-token distributions on these
            completions, in nats a token.
        """
        prompts, completions = self._answers(judge, model, tokenizer)
        found = self._rewards(completions)
        found |= {f"share/{name}": share for name, share in degenerate(completions).items()}
        found["kl"] = kl_of_answers(model, judge.start, prompts, completions)
        if samples and self.graded:
            found |= self._passes(judge, model, tokenizer)
        return found

    def score(self, judge: Judge, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, float]:
        """Mean of each reward over greedy completions."""
        return self._rewards(self._answers(judge, model, tokenizer)[1])

    def _answers(
        self, judge: Judge, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, seed: int | None = None
    ) -> tuple[list[list[int]], list[Completion]]:
        """Prompts and completions: greedy ones, or samples by a seed."""
        engine = judge.engine(model, tokenizer, self.tokens, sampled=seed is not None)
        prompts = engine.tokenize(list(self.held_out["prompt"]))
        return prompts, engine.generate(prompts, seed=seed or 0)

    def _scores(self, reward: Callable[..., Any], completions: list[Completion]) -> Any:
        columns = {name: list(self.held_out[name]) for name in self.held_out.column_names if name != "prompt"}
        return reward([completion.text for completion in completions], **columns)

    def _rewards(self, completions: list[Completion]) -> dict[str, float]:
        scores = {reward.__name__: self._scores(reward, completions) for reward in self.rewards}
        return {
            name: values if isinstance(values, float) else statistics.fmean(values) for name, values in scores.items()
        }

    def _passes(self, judge: Judge, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, float]:
        """Share of prompts with a right answer among the first k samples, k = 1, 2, 4, 8."""
        drawn = [
            self._scores(self.rewards[0], self._answers(judge, model, tokenizer, seed)[1]) for seed in range(SAMPLES)
        ]
        return passes(drawn)


def kl_of_answers(
    model: PreTrainedModel, start: PreTrainedModel, prompts: Sequence[list[int]], completions: Sequence[Completion]
) -> float:
    """KL(model || start) of next-token distributions, the mean over the completions' tokens, in nats."""
    values = []
    for prompt, completion in zip(prompts, completions, strict=True):
        ids = torch.tensor([prompt + completion.ids])
        answer = slice(len(prompt) - 1, len(prompt) - 1 + len(completion.ids))
        values.append(kl_divergence(model(ids).logits[0, answer], start(ids).logits[0, answer]))
    return torch.cat(values).mean().item()


def degenerate(completions: list[Completion]) -> dict[str, float]:
    """Shares of completions that are empty, cut at the most tokens, or have the same word three times in a row."""
    tests: dict[str, Callable[[Completion], bool]] = {
        "empty": lambda completion: not completion.text.strip(),
        "cut": lambda completion: completion.truncated,
        "repeated": lambda completion: repeats(completion.text.lower().split()),
    }
    return {name: statistics.fmean(map(test, completions)) for name, test in tests.items()}


def repeats(words: list[str]) -> bool:
    return any(a == b == c for a, b, c in zip(words, words[1:], words[2:], strict=False))


def passes(drawn: Sequence[Sequence[float]]) -> dict[str, float]:
    """Share of prompts with a right answer among k samples, of the rewards of all prompts for each sample."""
    of_prompts = np.array(drawn, dtype=float).T
    return {f"pass@{k}": statistics.fmean(pass_at(rewards, k) for rewards in of_prompts) for k in tries(len(drawn))}
