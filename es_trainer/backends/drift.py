"""How far the model has drifted from the start of the run: its next-token distributions on held-out prompts."""

from collections.abc import Callable, Hashable, Iterable
from itertools import islice
from typing import TypeVar

import torch
from datasets import Dataset, IterableDataset

from ..data import collate
from ..engines.image_prompts import identity
from .base import Backend


T = TypeVar("T")

LAST_TOKENS = 64  # of each prompt: what bounds the memory


class Drift:
    """
    Compares next-token distributions with those of the start, on the same prompts.

    Process 0 keeps the logits of the start in host memory: those of the last `LAST_TOKENS` tokens of each prompt, in
    the dtype in which the model computes them, so that nothing is rounded.

    Args:
        backend ([`Backend`]):
            Has the model.
        number (`int`):
            Prompts of each evaluation dataset that are compared: the first ones. With 0, nothing is.
    """

    def __init__(self, backend: Backend, number: int):
        self.backend = backend
        self.number = number
        self._start: dict[Hashable, torch.Tensor] | None = None  # logits of each prompt

    def begin(self, datasets: Iterable[Dataset | IterableDataset]) -> None:
        """
        Let the weights as they are be the start.

        Args:
            datasets (`Iterable[Dataset | IterableDataset]`):
                Those that will be evaluated.
        """
        if self.number == 0:
            return
        start: dict[Hashable, torch.Tensor] = {}

        def keep() -> None:
            for dataset in datasets:
                prompts = self._prompts(dataset)
                start.update({key: self._logits(prompt).to("cpu", copy=True) for key, prompt in prompts.items()})

        self._on_process_0(keep)
        self._start = start

    def metrics(self, dataset: Dataset | IterableDataset) -> dict[str, float]:
        """
        The drift of the weights as they are, under the name `"kl"`.

        Args:
            dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
                The dataset that is evaluated.

        Returns:
            `dict[str, float]`: KL(start || now) in nats, the mean over the prompts' tokens. It is 0 before training,
            and missing if the start did not read these prompts.
        """
        if self.number == 0:
            return {}
        if self._start is None:
            return {"kl": 0.0}
        value = self._on_process_0(lambda: self._mean_kl(self._prompts(dataset), self._start))
        return {} if value is None else {"kl": value}

    def _mean_kl(self, prompts: dict[Hashable, list[int]], start: dict[Hashable, torch.Tensor]) -> float | None:
        if not start.keys() >= prompts.keys():
            return None
        values = [kl_divergence(start[key], self._logits(prompt)) for key, prompt in prompts.items()]
        return torch.cat(values).mean().item()

    def _prompts(self, dataset: Dataset | IterableDataset) -> dict[Hashable, list[int]]:
        """The first prompts, by what tells them apart."""
        rows = collate(list(islice(dataset, self.number)), "eval_dataset")
        if not rows:  # of a stream, which the evaluation refuses
            return {}
        return {identity(prompt): prompt for prompt in self.backend.answers.tokenize(self.backend.engine, rows)}

    def _logits(self, prompt: list[int]) -> torch.Tensor:
        # One prompt at a time: without padding, the same weights have the same logits to the last bit
        return self.backend.engine.logits(prompt, LAST_TOKENS)

    def _on_process_0(self, work: Callable[[], T]) -> T:
        with self.backend.ready(for_members=False):
            return self.backend.processes.on_first(work)


def kl_divergence(start: torch.Tensor, now: torch.Tensor) -> torch.Tensor:
    """
    KL(start || now) of each row, in nats (Kullback and Leibler, 1951).

    It is computed in float64, because early in a run it is smaller than the rounding errors of float32.

    Args:
        start (`torch.Tensor`):
            Logits, of shape `(tokens, vocabulary)`.
        now (`torch.Tensor`):
            Those to compare with, of the same shape.

    Returns:
        `torch.Tensor` of shape `(tokens,)`, on the device of `now`.
    """
    p, q = (logits.to(now.device, torch.float64).log_softmax(dim=-1) for logits in (start, now))
    # Tokens that a model never gives have infinite logits
    return torch.where(p.isneginf(), 0.0, p.exp() * (p - q)).sum(dim=-1)
