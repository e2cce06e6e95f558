"""vLLM in this process with many adapters at the same time, each of which is a member."""

import contextlib
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, get_args

from ..config import ESConfig
from ..evolution import Member
from ..run.processes import Processes
from .peft_members import AdapterMembers
from .vllm_engine import VLLMEngine, logprobs
from .vllm_slots import LowRankMembers, Slots, slot_request
from .vllm_weights import require_used_weights


if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest


class VLLMLoRAEngine(VLLMEngine):
    """
    Generates with the adapters in vLLM's slots; see [`VLLMEngine`].

    `population_batch_size`, or the share of the population that a group of processes evaluates, are the members that
    there are slots for.
    """

    members: LowRankMembers | AdapterMembers  # what writes members, as soon as there are weights

    def _options(self, args: ESConfig, processes: Processes) -> dict[str, Any]:
        from vllm.config.lora import MaxLoRARanks

        groups = processes.count // args.vllm_tensor_parallel_size
        self.most_members = args.population_batch_size or -(-args.largest_population // groups)
        slots = self._slots_for(self.most_members)
        return super()._options(args, processes) | {
            "enable_lora": True,
            "max_loras": slots,
            "max_cpu_loras": slots,
            "max_lora_rank": next(rank for rank in get_args(MaxLoRARanks) if rank >= self._rank(args)),
        }

    def _slots_for(self, members: int) -> int:
        return members

    def _rank(self, args: ESConfig) -> int:
        return args.perturbation_rank

    def slots(self) -> dict[str, Slots]:
        """The adapter slots of the parameters that have some, by the parameters' names."""
        return self._find_slots({name: parameter.shape for name, parameter in self.model.named_parameters()})

    def _find_slots(self, weights: Mapping[str, Sequence[int]]) -> dict[str, Slots]:
        """
        Raises:
            [`LoadError`]: If vLLM does not compute with what is in them.
        """
        (found,) = self.llm.collective_rpc("slots", args=(weights,))
        with self.woken_up():
            require_used_weights(
                list(found),
                lambda name: found[name].filled(),
                functools.partial(logprobs, self.llm, adapter=slot_request(0)),
                self.tokenizer,
                self.context,
                where="of adapters, ",
            )
        return found

    @contextlib.contextmanager
    def install(self, members: Sequence[Member], sigma: float) -> "Iterator[list[LoRARequest | None]]":
        """Inside, there is an adapter for each member."""
        perturbed = [member for member in members if not member.is_center]
        self.members.write(perturbed, sigma)
        slots = iter(range(len(perturbed)))
        yield [self.unperturbed() if member.is_center else slot_request(next(slots)) for member in members]
