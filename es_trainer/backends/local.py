"""Every process has all weights and evaluates members of its own: one at a time, or many in a population batch."""

import contextlib
import time
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin
from transformers.utils import logging

from ..config import ESConfig
from ..engines import PopulationBatch, TransformersEngine
from ..engines.forward_pass import parameters_behind
from ..engines.generation_config import check_generation_kwargs
from ..engines.image_prompts import ImagePrompt
from ..evolution import EvolutionStrategy, Member
from ..precision import frozen_tensors, kept_in_float32
from ..run.history import make_optimizer, run_config, working_dtype
from ..text_only import freeze, other_modalities
from ..weights.layouts import Quantized
from .base import Backend, model_name, trained
from .initial_weights import InitialWeights
from .results import Prompts, Result, results
from .trainer_inputs import TrainerInputs


logger = logging.get_logger(__name__)


class Local(Backend):
    """The model's weights in each process, with Transformers' `generate`."""

    _warned_of_memory = False

    @classmethod
    def check_arguments(cls, args: ESConfig, inputs: TrainerInputs) -> None:
        check_generation_kwargs(args)
        if args.has_beams and (args.perturbation == "low_rank" or args.population_batch_size != 1):
            raise ValueError(
                "`generation_kwargs` has 'num_beams': beam search evaluates one member at a time; set "
                "perturbation='gaussian' and population_batch_size=1."
            )

    def start(self, model: PreTrainedModel, processing_class: PreTrainedTokenizerBase | ProcessorMixin) -> None:
        self.model = model
        tensors = [*model.parameters(), *model.buffers()]
        self.processes.broadcast([tensor.data for tensor in tensors], self.args.device)
        self.engine = self._make_engine(processing_class)

    def _make_engine(self, processing_class: PreTrainedTokenizerBase | ProcessorMixin) -> TransformersEngine:
        return TransformersEngine(self.model, processing_class, self.args)

    def begin(self, decayed: set[str]) -> EvolutionStrategy:
        config = run_config(self.args)
        dtype = working_dtype(config)
        if self.answers.image_prompt is not None:
            self._freeze_unread(self.answers.image_prompt)
        frozen, float32 = self._frozen(dtype), kept_in_float32(self.model, dtype)
        self.optimizer = make_optimizer(
            trained(self.model),
            decayed,
            config,
            frozen=frozen,
            engine_weights=self._engine_weights(),
            float32=float32,
            quantized=self._quantized_weights(),
            anchor_weights=self._anchor_weights(),
        )
        self.population_batch = self._make_population_batch()
        self._check_drift()
        return self.optimizer

    def _freeze_unread(self, prompt: ImagePrompt) -> None:
        """
        Freeze what of the parts for other inputs than texts is not trained: what a prompt with images does not need,
        or all of it if members are to be evaluated together.
        """
        others = other_modalities(self.model)
        if self._evaluates_together():
            freeze(
                self.model,
                others,
                "members that are evaluated together share what they see. To train them, too, set "
                "perturbation='gaussian' and population_batch_size=1",
            )
            return
        behind = parameters_behind(self.model, self.engine.images, prompt)
        unread = [name for name in others if self.model.get_parameter(name) not in behind]
        freeze(self.model, unread, "no completion of the prompts depends on them")

    def _evaluates_together(self) -> bool:
        """Whether the config asks for members that are evaluated together."""
        return self.args.perturbation == "low_rank" or self.args.population_batch_size not in (None, 1)

    def _frozen(self, dtype: torch.dtype | None) -> list[torch.Tensor]:
        """The tensors of the model that are not trained, and follow the working dtype."""
        return frozen_tensors(self.model, dtype)

    def _anchor_weights(self) -> Literal["device", "host"] | InitialWeights:
        """Where the initial weights are, for the optimizer."""
        if self.args.anchor_weights == "model" and self.args.anchor_decay > 0:
            return InitialWeights(self.model, self.source, self.args.model_init_kwargs or {})
        return "host" if self.args.anchor_weights == "host" else "device"

    def _engine_weights(self) -> None:
        """The weights that an engine has, if they are not the model's parameters."""
        return None

    def _quantized_weights(self) -> dict[nn.Parameter, Quantized]:
        """The layouts of parameters that the model computes with from 8 bits."""
        return {}

    def _check_drift(self) -> None:
        if self.optimizer.weights.drifts and self.processes.count > self.parts and self.population_batch is None:
            raise ValueError(
                "`master_weights='none'` leaves rounding errors of the members that a process evaluates in its "
                f"weights, so those of {self.processes.count} processes would drift apart. Use 'device' or "
                "'host', or perturbation='low_rank', which does not write members into the weights."
            )

    def _make_population_batch(self) -> PopulationBatch | None:
        """What evaluates many members at once, or `None` if they are evaluated one at a time."""
        if not self.answers.by_engine:
            return None
        if not self.optimizer.weights.perturbation.has_factors:
            on_cpu = self.model.device.type == "cpu"
            if self.args.population_batch_size == 1 or (self.args.population_batch_size is None and on_cpu):
                return None
        batch = PopulationBatch(self.model, self.optimizer.weights)
        problem = batch.check(self.engine.trial_inputs(self.answers.image_prompt))
        if problem is not None:
            logger.warning(
                f"Members are evaluated one at a time, because this model cannot evaluate several at once: {problem}."
            )
            return None
        self.engine.generation_config.disable_compile = True  # compiled code would not see the members
        return batch

    def check(self, model: nn.Module) -> None:
        super().check(model)
        if self.population_batch is not None:
            self.population_batch.check_forwards()

    # ---- evaluation ----

    def evaluate(self, members: Sequence[tuple[int, Member]], prompts: Prompts) -> Iterator[tuple[list[Result], int]]:
        size, batch_size = self._batch_sizes(prompts)
        # The unperturbed weights go with the last members: a batch of their own could take as long as another
        along = int(self.population_batch is not None and members[-1][1].is_center)
        count = len(members) - along
        with self.processes.queue(count, self.group_size) as queue:
            while taken := queue.take(size):
                stop = taken.stop + along if taken.stop == count else taken.stop
                group = members[taken.start : stop]
                with self._installed([member for _, member in group]) as installed:
                    models = {number: model_name(number, member) for number, member in group}
                    results = self._complete(models, prompts, installed, batch_size)
                yield results, stop

    def answer(self, prompts: Prompts, number: int) -> list[Result]:
        _, batch_size = self._batch_sizes(prompts)
        return self._complete({number: "policy"}, prompts, None, batch_size)

    @contextlib.contextmanager
    def _installed(self, members: Sequence[Member]) -> Iterator[Any]:
        """Inside, the model evaluates `members`: many in a population batch, or one written into the weights."""
        if self.population_batch is None or self._is_written(members):
            with self._timed_noise():
                self.optimizer.perturb(*members)
            yield None
            return
        with contextlib.ExitStack() as stack:
            with self._timed_noise():
                self.optimizer.restore()  # the member that was written before, which others of a batch would share
                group = stack.enter_context(self.population_batch.install(members, self.optimizer.sigma))
            yield group

    def _is_written(self, members: Sequence[Member]) -> bool:
        """Whether a batch would be of one member with a copy of all weights, which is better written into them."""
        weights = self.optimizer.weights
        return len(members) == 1 and not weights.perturbation.has_factors and not weights.drifts

    def _complete(
        self, models: dict[int, str], prompts: Prompts, installed: Any, batch_size: int | None
    ) -> list[Result]:
        """
        What the installed members, or the weights as they are, answer to this process's share of their prompts.
        `models` has their numbers and names.
        """
        start = time.perf_counter()
        asked = [prompts.of(number) for number in models]
        own = self.engine.prompt_shard(len(asked[0].rows))
        answer = self.answers.complete(self.engine, asked, own, list(models.values()), installed, batch_size)
        if not own:  # fewer prompts than processes, which generate together nevertheless
            return []
        seconds = (time.perf_counter() - start) / len(models)
        return results(list(models), own, asked, answer, seconds, self.processes.rank)

    def _batch_sizes(self, prompts: Prompts) -> tuple[int, int | None]:
        """Members evaluated together, and most sequences generated at once (`None`: all of them)."""
        tokens, batch_size = self.answers.sizes(self.engine, prompts)
        if self.population_batch is None:
            return 1, batch_size
        if self.args.population_batch_size is not None:
            return self.args.population_batch_size, batch_size
        rows = len(prompts.of(0).ids) * prompts.number
        members, fitting = self.population_batch.fitting(rows, tokens, batch_size)
        wanted = min(rows, batch_size or rows)
        if fitting == 0:
            raise ValueError(
                f"There is no memory left to generate {tokens} tokens (the longest prompt and "
                f"`max_completion_length={self.engine.max_new_tokens}`). Lower `max_completion_length`, drop the "
                "longest prompts, or set `population_batch_size` to try nevertheless."
            )
        if fitting < wanted:
            if not self._warned_of_memory:
                logger.warning(
                    f"Memory does not suffice for all sequences of a member at once: they are generated {fitting} at "
                    "a time. Set `generation_batch_size` to choose another number. (Shown once.)"
                )
                self._warned_of_memory = True
            batch_size = fitting
        # No more than leaves something for the other processes
        return min(members, -(-self.optimizer.population_size // self.processes.count)), batch_size
