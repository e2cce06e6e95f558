"""vLLM in this process with a base model that is not trained, and an adapter of PEFT's that is."""

from typing import TYPE_CHECKING, Any

import torch

from ..config import ESConfig
from ..evolution import Member
from ..run.history import run_config, working_dtype
from .peft_members import AdapterMembers, largest_rank, lora_layers, require_slots
from .vllm_lora_engine import VLLMLoRAEngine
from .vllm_slots import Slots, slot_request


if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest


class VLLMAdapterEngine(VLLMLoRAEngine):
    """
    Generates with the adapters in vLLM's slots, of which the last one has the unperturbed adapter; see [`VLLMEngine`].
    """

    members: AdapterMembers

    def _dtype(self, args: ESConfig) -> Any:
        # The model here has no weights, and its dtype says nothing
        return working_dtype(run_config(args)) or (args.model_init_kwargs or {}).get("dtype", torch.float32)

    def _slots_for(self, members: int) -> int:
        return members + 1

    def _rank(self, args: ESConfig) -> int:
        return largest_rank(lora_layers(self.model))

    def slots(self) -> dict[str, Slots]:
        """
        The slots of the adapter's layers, by the names of the weights that they add to.

        Raises:
            [`LoadError`]: If vLLM has no slots for a layer; names it.
        """
        weights = {name: layer.shape for name, layer in lora_layers(self.model).items()}
        found = self._find_slots(weights)
        require_slots(weights, found)
        return found

    def unperturbed(self) -> "LoRARequest":
        """Write the adapter as it is into its slot."""
        self.members.write([Member(0, 0)], 0.0, self.most_members)
        return slot_request(self.most_members)
