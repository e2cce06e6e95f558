"""Weights partitioned by DeepSpeed ZeRO-3. DeepSpeed loads, partitions and gathers; it has no optimizer here."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from ..config import ESConfig
from ..engines import TransformersEngine
from ..evolution import Member
from ..fields import require
from ..weights.layouts.zero3 import is_partitioned
from .base import require_saved_state
from .local import Local
from .results import Prompts, Result
from .trainer_inputs import TrainerInputs


if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


class Gathered(Local):
    """The weights are gathered once a step, after which each process evaluates members of its own."""

    partitioned = True
    no_images = "DeepSpeed ZeRO-3 is not supported with images. Launch without it"

    @classmethod
    def check_arguments(cls, args: ESConfig, inputs: TrainerInputs) -> None:
        super().check_arguments(args, inputs)
        require_saved_state(args)

    @property
    def parts(self) -> int:
        return self.processes.count

    @property
    def in_place(self) -> bool:
        return False

    def start(self, model: PreTrainedModel, processing_class: PreTrainedTokenizerBase | ProcessorMixin) -> None:
        self.model = model
        self._partition()
        self.engine = self._make_engine(processing_class)

    def _partition(self) -> dict:
        """What is not partitioned yet, will be: process 0's weights count. Returns DeepSpeed's config."""
        import deepspeed

        configured = self.args.deepspeed_plugin.deepspeed_config["zero_optimization"]
        zero = {key: value for key, value in configured.items() if value != "auto"}
        config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero}
        partitioned = [parameter for parameter in self.model.parameters() if is_partitioned(parameter)]
        others: list[nn.Parameter] = [p for p in self.model.parameters() if not is_partitioned(p)]
        if partitioned and others:  # an adapter was added
            partitioned[0].convert_to_zero_parameters(param_list=others)
        elif others:
            deepspeed.zero.Init(module=self.model, config_dict_or_path=config)
        for buffer in self.model.buffers():
            buffer.data = buffer.data.to(self.args.device)
        return config

    @contextlib.contextmanager
    def ready(self, for_members: bool) -> Iterator[None]:
        with self.optimizer.weights.gathered(for_members, masters=self.population_batch is None):
            yield


class Lockstep(Gathered):
    """
    All processes evaluate the same member, each on its share of the prompts; modules gather their parameters for each
    forward pass.
    """

    in_lockstep = True
    deepspeed: "DeepSpeedEngine"

    @classmethod
    def check_arguments(cls, args: ESConfig, inputs: TrainerInputs) -> None:
        super().check_arguments(args, inputs)
        if inputs.runs_code:
            raise ValueError(
                "`tools`, `environment_factory`, `rollout_func` and `agent_func` with "
                "`ds3_gather_for_generation=False`: processes would have to run the model equally often. Set "
                "`ds3_gather_for_generation=True`."
            )
        require(
            args,
            args.eval_kl_prompts == 0,
            "eval_kl_prompts",
            "with ds3_gather_for_generation=False, no process can run the model alone. Set it to 0, or "
            "ds3_gather_for_generation=True.",
        )

    @property
    def in_place(self) -> bool:
        return True

    def _partition(self) -> dict:
        import deepspeed

        config = super()._partition()
        self.deepspeed, *_ = deepspeed.initialize(model=self.model, config=config)
        return config

    def _make_engine(self, processing_class: PreTrainedTokenizerBase | ProcessorMixin) -> TransformersEngine:
        shares = (self.processes.rank, self.processes.count)
        return TransformersEngine(self.model, processing_class, self.args, shares)

    def _make_population_batch(self) -> None:
        return None

    def ready(self, for_members: bool) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    @contextlib.contextmanager
    def _forward_passes(self) -> Iterator[None]:
        """Inside, modules gather their parameters; afterwards, none is gathered any more."""
        try:
            yield
        finally:
            self.deepspeed.optimizer.partition_all_parameters()

    def evaluate(self, members: Sequence[tuple[int, Member]], prompts: Prompts) -> Iterator[tuple[list[Result], int]]:
        for number, member in members:
            with self._timed_noise():
                self.optimizer.perturb(member)
            yield self.answer(prompts, number), number + 1

    def answer(self, prompts: Prompts, number: int) -> list[Result]:
        with self._forward_passes():
            return self._complete({number: "policy"}, prompts, None, self.args.generation_batch_size)

    def texts(self, prompt_ids: list[list[int]]) -> list[str]:
        with self._forward_passes():
            completions = self.engine.generate(prompt_ids, seed=0)
        parts = self.processes.exchange(lambda: [completion.text for completion in completions])
        return [parts[i % len(parts)][i // len(parts)] for i in range(len(prompt_ids))]
