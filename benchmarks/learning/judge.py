"""What is measured along a run, in the same way for every trainer."""

from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.texts import TEXTS
from es_trainer import ESConfig
from es_trainer.backends.drift import kl_divergence
from es_trainer.engines import TransformersEngine
from es_trainer.smollm2 import smollm2


class Judge:
    """
    Measures the model of a run on a task, on another task, and on texts about ordinary things.

    Args:
        task (`Any`):
            The task that is learned.
        other ([`Questions`]):
            The task that may be forgotten meanwhile.
    """

    def __init__(self, task: Any, other: Any):
        self.task, self.other = task, other
        # Made before the trainer: each of them resets Accelerate's state
        self.configs = {
            (tokens, sampled): ESConfig(
                "unused",
                use_cpu=True,
                bf16=True,
                max_completion_length=tokens,
                temperature=float(sampled),
                report_to="none",
            )
            for tokens in (task.tokens, other.tokens)
            for sampled in (False, True)
        }
        self.start = AutoModelForCausalLM.from_pretrained(smollm2(), dtype=torch.float32).eval()

    @torch.no_grad()
    def measure(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, samples: bool) -> dict[str, float]:
        """
        Args:
            model ([`~transformers.PreTrainedModel`]):
                With the weights to measure.
            tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
                Its tokenizer.
            samples (`bool`):
                Whether the task is measured by samples, too, which takes longer.

        Returns:
            `dict[str, float]`: What the task measures; `other/...`: the rewards of the other task; `texts_nll` and
            `texts_kl`: negative log-likelihood and KL(start || now) in nats a token of the texts.
        """
        training = model.training
        model.eval()
        found = self.task.measure(self, model, tokenizer, samples)
        found |= {f"other/{name}": value for name, value in self.other.score(self, model, tokenizer).items()}
        found |= self._texts(model, tokenizer)
        model.train(training)
        return found

    def engine(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tokens: int, sampled: bool
    ) -> TransformersEngine:
        """What completes prompts, greedily or at temperature 1."""
        return TransformersEngine(model, tokenizer, self.configs[tokens, sampled])

    def _texts(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, float]:
        surprise, drift = [], []
        for text in TEXTS:
            ids = tokenizer(text, return_tensors="pt")["input_ids"]
            now, start = model(ids).logits[0, :-1], self.start(ids).logits[0, :-1]
            surprise.append(torch.nn.functional.cross_entropy(now.float(), ids[0, 1:], reduction="none"))
            drift.append(kl_divergence(start, now))
        return {"texts_nll": torch.cat(surprise).mean().item(), "texts_kl": torch.cat(drift).mean().item()}
