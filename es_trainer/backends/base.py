"""What backends have in common. A backend knows where the weights are, how a member gets in, and who answers."""

import contextlib
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin
from transformers.utils import logging

from ..config import ESConfig
from ..data import has_images, image_columns
from ..engines import Engine
from ..evolution import EvolutionStrategy, Member
from ..fields import require
from ..run.history import start_checksum
from ..run.processes import Processes
from .answers import Answers
from .results import Prompts, Result
from .trainer_inputs import TrainerInputs


logger = logging.get_logger(__name__)


class Backend(ABC):
    """
    Evaluates members.

    Args:
        args ([`ESConfig`]):
            The config.
        processes ([`Processes`]):
            Those of the run.
        answers ([`Answers`]):
            Who makes completions of prompts.
        source (`str`, *optional*):
            Name or folder of the model, if it was given by that.
    """

    loads_weights = True  # whether this process loads the model with its weights
    moves_model = True  # whether the Trainer moves the model to the device
    partitioned = False  # whether each process has a part of every parameter
    in_lockstep = False  # whether all processes go through every forward pass together
    no_images: str | None = None  # why images are refused, and the way out
    group_size = 1  # processes that evaluate the same members, each with its part of the weights

    engine: Engine
    optimizer: EvolutionStrategy

    def __init__(self, args: ESConfig, processes: Processes, answers: Answers, source: str | None):
        self.args = args
        self.processes = processes
        self.answers = answers
        self.source = source
        self.population_batch: Any = None  # what evaluates many members at once, if they are not written into weights
        self.noise_seconds = 0.0  # of the population that is evaluated
        self._evaluating_members = False

    def check_data(self, datasets: dict[str, Any]) -> None:
        """
        Look through what can be told of datasets before a model is loaded.

        Raises:
            `ValueError`: If one has images, and this backend or who answers cannot read them.
        """
        reason = self.no_images or self.answers.no_images
        for name, dataset in datasets.items():
            if reason is not None and has_images(dataset):
                columns = image_columns(dataset)
                place = f"the column {columns[0]!r}" if columns else "images in its prompts"
                way_out = f"give dataset.remove_columns({columns!r})" if columns else "leave the images out"
                raise ValueError(f"`{name}` has {place}, but {reason}, or {way_out} to train on the text alone.")

    @property
    def parts(self) -> int:
        """Processes among which the weights are shared out."""
        return self.group_size

    @property
    def scores(self) -> bool:
        """Whether this process scores what it generates. Of a group, the first does."""
        return self.processes.rank % self.group_size == 0

    @property
    def in_place(self) -> bool:
        """Whether members are written into the weights, which leaves rounding errors without masters."""
        return self.population_batch is None

    @property
    def has_whole_weights(self) -> bool:
        """Whether this process has all of every parameter."""
        return not self.optimizer.weights.partitioned

    @classmethod
    @abstractmethod
    def check_arguments(cls, args: ESConfig, inputs: TrainerInputs) -> None:
        """
        Raises:
            `ValueError` or `TypeError`: If the config or what the trainer is given asks for something that this
                backend cannot do; names it and the way out.
        """

    # ---- the run ----

    @abstractmethod
    def start(self, model: PreTrainedModel, processing_class: PreTrainedTokenizerBase | ProcessorMixin) -> None:
        """Give every process the weights of process 0, or its part of them, and make the engine."""

    @abstractmethod
    def begin(self, decayed: set[str]) -> EvolutionStrategy:
        """Make the evolution strategy over all parameters with `requires_grad`; `decayed` names those that decay."""

    def check(self, model: nn.Module) -> None:
        """
        Raises:
            `RuntimeError`: If perturbations would not reach the model, because it is another than that of `begin`, or
                was changed since.
        """
        self.optimizer.weights.check(model)

    def start_checksum(self) -> int | None:
        """The checksum of the weights, if this process can tell it."""
        return start_checksum(self.optimizer)

    def resume(self, update_records: list[dict[str, Any]]) -> None:  # noqa: B027 (most backends need nothing of it)
        """Take note of the history up to a checkpoint, before the optimizer's state is loaded."""

    def collect(self) -> dict[torch.Tensor, torch.Tensor] | None:
        """All weights, by the tensors of the model, if this process does not have them; all processes help."""
        return None if self.has_whole_weights else self.optimizer.weights.collect(keep=self.args.should_save)

    # ---- the unperturbed weights ----

    @contextlib.contextmanager
    def in_working_dtype(self) -> Iterator[None]:
        """Inside, the model computes with the unperturbed weights in the working dtype."""
        self.take_member_out()
        with self.optimizer.weights.in_working_dtype() as changed:
            if changed:
                logger.warning(
                    f"{len(changed)} parameters ({', '.join(changed[:3])}{', ...' * (len(changed) > 3)}) were changed "
                    "outside of training, and their new values are trained from now on. `replay` needs the model as "
                    "it is now."
                )
            yield

    def take_member_out(self) -> None:
        """
        Make the weights the unperturbed ones, where a callback asks for them while members are evaluated.

        Raises:
            `RuntimeError`: If other processes could not follow.
        """
        if not self._evaluating_members:
            return
        if self.processes.count > 1 or self.partitioned:
            raise RuntimeError(
                "The model cannot be evaluated or saved while several processes evaluate the members of a "
                "population, each at its own pace. Do it in `on_step_end` instead of `on_substep_end`."
            )
        self.optimizer.restore()

    @contextlib.contextmanager
    def evaluating_members(self) -> Iterator[None]:
        """Inside, the weights may be those of a member; afterwards, they are the unperturbed ones."""
        self.noise_seconds = 0.0
        self._evaluating_members = True
        try:
            yield
        finally:
            self._evaluating_members = False
            with self._timed_noise():
                self.optimizer.restore()

    # ---- evaluation ----

    def ready(self, for_members: bool) -> contextlib.AbstractContextManager[None]:
        """Inside, members can be evaluated, or the unperturbed weights if not `for_members`."""
        return self.engine.woken_up()

    @abstractmethod
    def evaluate(self, members: Sequence[tuple[int, Member]], prompts: Prompts) -> Iterator[tuple[list[Result], int]]:
        """
        Have members complete the prompts, those that no other process has taken.

        Args:
            members (`Sequence[tuple[int, Member]]`):
                Members and their numbers in the population.
            prompts ([`Prompts`]):
                What they complete.

        Yields:
            `tuple[list[Result], int]`: results of members that were evaluated together, and how many members are done
            or taken.
        """

    @abstractmethod
    def answer(self, prompts: Prompts, number: int) -> list[Result]:
        """Have the weights as they are complete the prompts. The result, which there is none of where a process has no
        share of the prompts, has the number of the batch that they are."""

    def texts(self, prompt_ids: list[list[int]]) -> list[str]:
        """Greedy answers of the unperturbed weights, on all processes."""
        with self.ready(for_members=False):
            replies = self.processes.exchange(
                lambda: self.engine.generate(prompt_ids, seed=0) if self.processes.rank < self.group_size else []
            )
        return [completion.text for completion in replies[0]]

    @contextlib.contextmanager
    def _timed_noise(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.noise_seconds += time.perf_counter() - start


def model_name(number: int, member: Member) -> str:
    """The name under which programs find a member."""
    return "policy" if member.is_center else f"member-{number}"


def trained(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The parameters to train."""
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


def require_saved_state(args: ESConfig) -> None:
    """
    Raises:
        `ValueError`: If the best model would have to be loaded from a state that is not saved.
    """
    require(
        args,
        not (args.save_only_model and args.load_best_model_at_end),
        "save_only_model",
        "with load_best_model_at_end, weights that are on servers or partitioned are loaded from the optimizer's "
        "state; leave it out.",
    )
