"""Multimodal models: which parameters are trained, on texts and on texts with images."""

import re

from accelerate.utils import is_peft_model
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging


logger = logging.get_logger(__name__)


def freeze_other_modalities(model: nn.Module) -> None:
    """
    Freeze the parameters of a multimodal model that no completion of a text depends on, such as those of its vision
    tower. A gradient would leave them as they are; without one, perturbations that no reward tells apart would add up.
    """
    freeze(model, other_modalities(model), "no completion of a text depends on them")


def other_modalities(model: nn.Module) -> list[str]:
    """Names of the trained parameters of a model that no completion of a text depends on."""
    base = model.get_base_model() if is_peft_model(model) else model
    if base.input_modalities == "text":
        return []
    kept: set[nn.Parameter] = set()
    for part in (base.get_decoder(), base.get_input_embeddings(), base.get_output_embeddings()):
        if part is not None:
            kept.update(part.parameters())
    # Parts inside of a decoder: towers, and two that do nothing without an image or a sound
    from transformers.models.mllama.modeling_mllama import MllamaCrossAttentionDecoderLayer
    from transformers.models.phi4_multimodal.modeling_phi4_multimodal import Phi4MultimodalFeatureEmbedding

    for part in base.modules():
        tower = isinstance(part, PreTrainedModel) and "text" not in part.input_modalities
        if tower or isinstance(part, (MllamaCrossAttentionDecoderLayer, Phi4MultimodalFeatureEmbedding)):
            kept.difference_update(part.parameters())
    return [name for name, p in model.named_parameters() if p.requires_grad and p not in kept]


def freeze(model: nn.Module, names: list[str], reason: str) -> None:
    """Freeze parameters, and say why."""
    for name in names:
        model.get_parameter(name).requires_grad = False
    if names:
        parts = dict.fromkeys(re.match(r"(base_model\.)?(model\.)*[^.]+", name).group() for name in names)
        logger.warning(f"{len(names)} parameters of `{', '.join(parts)}` stay as they are, because {reason}.")
