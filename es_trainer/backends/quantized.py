"""Every process has all weights, stored in 8 bits, which the members of a population batch share."""

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin
from transformers.utils import logging

from ..config import ESConfig
from ..engines import PopulationBatch
from ..engines.population_batch import owners_of_parameters
from ..fields import require
from ..precision import kept_in_float32
from ..run.history import run_config, working_dtype
from ..weights.codecs import CODECS
from ..weights.layouts import Quantized
from .base import require_saved_state, trained
from .local import Local
from .trainer_inputs import TrainerInputs


logger = logging.get_logger(__name__)

SHOWN = 4  # names of parameters in a message


class QuantizedLocal(Local):
    """
    Members add low-rank terms in the working dtype to products with weights that take a byte each. Updates go to the
    float32 masters, from which the weights are quantized anew.
    """

    moves_model = False  # or the device would need memory for the weights as they were given
    no_images = "`weight_quantization` is for texts. Leave it out"

    @classmethod
    def check_arguments(cls, args: ESConfig, inputs: TrainerInputs) -> None:
        super().check_arguments(args, inputs)
        require(
            args,
            args.perturbation == "low_rank",
            "weight_quantization",
            "members share the weights, and add terms of low rank to them: set perturbation='low_rank'.",
        )
        require(
            args,
            args.master_weights != "none",
            "master_weights",
            "with weight_quantization, updates need float32 masters: set it to 'host', or to 'device'.",
        )
        require(
            args,
            args.population_batch_size is None or args.population_batch_size > 1,
            "population_batch_size",
            "with weight_quantization, no member is written into the weights; set it to None, or to at least 2.",
        )
        require_saved_state(args)
        if inputs.rollout_func is not None:
            raise ValueError(
                "`rollout_func` with `weight_quantization`: the function is called for one member at a time, which "
                "would have to be written into the weights. Leave one of them out."
            )
        if inputs.has_adapter:
            raise ValueError(
                "`weight_quantization` stores the weights that are trained, but of an adapter (`peft_config`) these "
                "are few. Quantize the base model instead, with `quantization_config`, or leave `peft_config` out."
            )

    @property
    def has_whole_weights(self) -> bool:
        return False  # the model's parameters do not have them

    def start(self, model: PreTrainedModel, processing_class: PreTrainedTokenizerBase | ProcessorMixin) -> None:
        super().start(model, processing_class)
        self._quantize()

    def _quantize(self) -> None:
        """Quantize the matrices of linear layers and embeddings on the device, and move the rest there."""
        device, dtype = self.args.device, working_dtype(run_config(self.args))
        codec = CODECS[self.args.weight_quantization]
        self.quantized = {
            parameter: Quantized(parameter, owners, codec, dtype or parameter.dtype, device)
            for parameter, owners in quantizable(self.model, kept_in_float32(self.model, dtype)).items()
        }
        for tensor in (*self.model.parameters(), *self.model.buffers()):
            tensor.data = tensor.data.to(device)
        self._say_what_is_left()

    def _say_what_is_left(self) -> None:
        """
        Raises:
            `ValueError`: If no parameter is quantized.
        """
        names = {name: p for name, p in trained(self.model) if p not in self.quantized and p.dim() >= 2}
        if not self.quantized:
            raise ValueError(
                f"`weight_quantization={self.args.weight_quantization!r}`: {type(self.model).__name__} has no trained "
                "matrices of linear layers or embeddings. Leave it out."
            )
        if names:
            logger.warning(
                f"`weight_quantization={self.args.weight_quantization!r}`: {len(names)} matrices stay in the working "
                "dtype, as other modules than linear layers and embeddings compute with them: "
                f"{', '.join(list(names)[:SHOWN])}{', ...' * (len(names) > SHOWN)}."
            )

    def _quantized_weights(self) -> dict[nn.Parameter, Quantized]:
        return self.quantized

    def _make_population_batch(self) -> PopulationBatch:
        batch = super()._make_population_batch()
        if batch is None:
            raise ValueError(
                f"`weight_quantization={self.args.weight_quantization!r}` needs members that are evaluated in one "
                "batch, which this model or run cannot (see the warning above, if there is one). Leave it out."
            )
        return batch


def quantizable(model: nn.Module, left: set[str]) -> dict[nn.Parameter, list[tuple[nn.Module, str]]]:
    """
    The trained matrices that linear layers and embeddings alone compute with, and these modules with the attribute
    under which they have it.

    Args:
        model (`nn.Module`):
            The model.
        left (`set[str]`):
            Names of parameters to leave alone.
    """
    names = {parameter: name for name, parameter in trained(model)}
    return {
        parameter: [(module, attribute) for _, module, attribute in own]
        for parameter, own in owners_of_parameters(model).items()
        if parameter in names
        and names[parameter] not in left
        and all(_computes_with(module, attribute) for _, module, attribute in own)
    }


def _computes_with(module: nn.Module, attribute: str) -> bool:
    if attribute != "weight":
        return False
    return isinstance(module, nn.Linear) or (isinstance(module, nn.Embedding) and module.max_norm is None)
