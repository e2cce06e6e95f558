"""Tries settings before a run: sigmas by what their members say, step lengths by held-out rewards."""

import inspect
from dataclasses import replace
from typing import Any

from transformers import IntervalStrategy

from .config import ESConfig
from .run.history import tell_again
from .run.probed import Found, TriedSigma, best_of
from .trainer import ESTrainer


SIGMAS = [2.0**k for k in range(-3, 4)]  # times the config's
STEP_LENGTHS = [2.0**k for k in range(-3, 4)]  # learning rates, times sigma


def config_of_probe(args: ESConfig) -> ESConfig:
    """
    The config to probe with for a run with another one.

    Raises:
        `ValueError`: If its updates are not the plain ones.
    """
    if args.es_optimizer != "sgd":
        raise ValueError(
            f"`es_optimizer={args.es_optimizer!r}` is not valid here: step lengths are tried along one estimate, as "
            "the plain update takes it. Set it to 'sgd'; what is found about sigma holds for the others, too."
        )
    steps = len(SIGMAS) + len(STEP_LENGTHS)
    return replace(
        args,
        **{"max_steps": steps, "logging_strategy": "steps", "logging_steps": 1, "report_to": "none"},
        **{"eval_strategy": "steps", "eval_steps": steps + 1, "evaluate_center": True},
        **{"lr_scheduler_type": "constant", "sigma_schedule": "constant", "skip_settled_prompts": 0.0},
        **{"population_size_schedule": {}, "num_prompts_per_step_schedule": {}, "auto_step": 0},
        **{"weight_decay": 0.0, "anchor_decay": 0.0},
        **{"save_strategy": "no", "save_steps": None, "load_best_model_at_end": False, "push_to_hub": False},
    )


class Probe(ESTrainer):
    """
    A run whose first steps evaluate the same members on the same prompts, with a sigma each, and move nothing. The
    steps after them take the update of the best of these at growing lengths, each from where the one before it ended.

    Its arguments are those of [`ESTrainer`], with the `args` of the run that is planned and an `eval_dataset`.

    Example:

    ```python
    from es_trainer import ESConfig
    from es_trainer.probe import Probe
    from es_trainer.report.probe import advice

    probe = Probe("my-model", brief, ESConfig("probe"), train_dataset=dataset, eval_dataset=held_out)
    print(advice(probe.run()))
    probe.end()
    ```
    """

    found: Found

    def __init__(self, *args: Any, **kwargs: Any):
        given = inspect.signature(super().__init__).bind(*args, **kwargs)
        config = given.arguments.get("args")
        if not isinstance(config, ESConfig):
            raise ValueError(f"`args={config!r}` is not valid here: set it to the `ESConfig` of the run.")
        if given.arguments.get("eval_dataset") is None:
            raise ValueError("`eval_dataset=None` is not valid here: lengths of steps need held-out prompts.")
        given.arguments["args"] = config_of_probe(config)
        super().__init__(*given.args, **given.kwargs)

    def run(self) -> Found:
        """Try all sigmas and step lengths. Afterwards, the weights are those of the longest step."""
        self.found = Found()
        self.args.eval_strategy = IntervalStrategy.NO  # evaluations are asked for here
        self.train()
        if self.found.sigma is not None:
            self._evaluate_length()
        return self.found

    def _reward_of_step(self, rows: list[dict[str, Any]]) -> float:
        """One sigma, or one length. Returns the members' mean reward."""
        step = self.state.global_step
        return self._try_sigma(step, rows) if step < len(SIGMAS) else self._go_on(step - len(SIGMAS))

    def _try_sigma(self, number: int, rows: list[dict[str, Any]]) -> float:
        if number == 0:
            self._rows, self._population = rows, self.optimizer.ask()
        self.optimizer.sigma = self.args.sigma * SIGMAS[number]
        self._set_learning_rate(0.0)
        return self._evaluate_and_tell(self._population, self._rows)

    def _go_on(self, number: int) -> float:
        if number == 0:
            self._choose()
        if self.found.sigma is None:
            self.control.should_training_stop = True
            self._set_learning_rate(0.0)
        else:
            self._evaluate_length()
            self._go_to(STEP_LENGTHS[number] * self.found.sigma.sigma)
        tell_again(self.optimizer, self._line)
        return self.recorder.repeat(self._line)

    def _choose(self) -> None:
        _, lines = self.history.read()
        all_tokens = 0
        for line in lines:
            metrics = line["metrics"]
            numbers = [metrics.get(key) for key in ("reward/center", "reward", "reward_std", "signal", "step_time")]
            self.found.sigmas.append(TriedSigma(line["sigma"], *numbers, metrics["num_tokens"] - all_tokens))
            all_tokens = metrics["num_tokens"]
        self.found.sigma = best_of(self.found.sigmas)
        self._line = lines[0 if self.found.sigma is None else self.found.sigmas.index(self.found.sigma)]
        self._learning_rate = 0.0  # of the update that the weights have

    def _evaluate_length(self) -> None:
        reward = self.evaluate()["eval_reward"]
        if self._learning_rate == 0.0:
            self.found.before = reward
        else:
            self.found.held_out[self._learning_rate] = reward

    def _go_to(self, learning_rate: float) -> None:
        self._set_learning_rate(learning_rate - self._learning_rate)
        self._learning_rate = learning_rate

    def _set_learning_rate(self, learning_rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
