"""Weights partitioned by DeepSpeed ZeRO-3. DeepSpeed loads, partitions and gathers; it has no optimizer here."""

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import nn

from ..weights.store import is_partitioned


if TYPE_CHECKING:
    from accelerate.utils import DeepSpeedPlugin
    from deepspeed import DeepSpeedEngine


class Zero3:
    """
    The model with its weights partitioned.

    Args:
        model (`nn.Module`):
            The model. What is not partitioned yet, will be: process 0's weights count.
        plugin ([`~accelerate.utils.DeepSpeedPlugin`]):
            Has the config.
        device (`torch.device`):
            Device of this process.
        hooks (`bool`):
            Whether modules gather their parameters for each forward pass. If not, all have to be gathered before.
    """

    def __init__(self, model: nn.Module, plugin: "DeepSpeedPlugin", device: torch.device, hooks: bool):
        import deepspeed

        zero = {key: value for key, value in plugin.deepspeed_config["zero_optimization"].items() if value != "auto"}
        config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero}
        partitioned = [parameter for parameter in model.parameters() if is_partitioned(parameter)]
        others = [parameter for parameter in model.parameters() if not is_partitioned(parameter)]
        if partitioned and others:  # an adapter was added
            partitioned[0].convert_to_zero_parameters(param_list=others)
        elif others:
            deepspeed.zero.Init(module=model, config_dict_or_path=config)
        for buffer in model.buffers():
            buffer.data = buffer.data.to(device)
        self.engine: DeepSpeedEngine | None = None
        if hooks:
            self.engine, *_ = deepspeed.initialize(model=model, config=config)

    @contextlib.contextmanager
    def lockstep(self) -> Iterator[None]:
        """Inside, modules gather their parameters for each forward pass; afterwards, none is gathered any more."""
        try:
            yield
        finally:
            self.engine.optimizer.partition_all_parameters()
