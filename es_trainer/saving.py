"""What would make saving a model fail, found before it is trained."""

from accelerate.utils import is_peft_model
from transformers import PreTrainedModel
from transformers.modeling_utils import remove_tied_weights_from_state_dict
from transformers.utils import logging

from .weights.layouts.zero3 import is_partitioned


logger = logging.get_logger(__name__)

# What Transformers refuses to save without `do_sample=True`, because it has no effect then
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")


def make_savable(model: PreTrainedModel) -> None:
    """
    Take settings of sampling that have no effect out of the model's generation config, with a warning.

    Raises:
        `ValueError`: If something else of the model cannot be saved.
    """
    _check_generation_config(model)
    if not is_peft_model(model):  # of which the adapter is saved
        _check_shared_weights(model)


def _check_generation_config(model: PreTrainedModel) -> None:
    config = model.generation_config
    problem = _problem(model)
    if problem is None:
        return
    set_here = {name: value for name in SAMPLING if (value := vars(config).get(name)) is not None}
    if not config.do_sample and set_here:
        for name in set_here:
            setattr(config, name, None)
        if _problem(model) is None:
            found = ", ".join(f"{name}={value}" for name, value in set_here.items())
            logger.warning(
                f"The model's generation config has {found} without `do_sample=True`. That has no effect, and cannot "
                "be saved: it is left out. Set `model.generation_config.do_sample = True` before the trainer is made "
                "to keep it for those who use the model."
            )
            return
        for name, value in set_here.items():
            setattr(config, name, value)
    raise ValueError(
        f"`model.generation_config` cannot be saved with the trained model: {problem} Change it before the trainer is "
        "made."
    )


def _problem(model: PreTrainedModel) -> str | None:
    try:
        model.generation_config.validate(strict=True)
    except ValueError as error:
        return " ".join(str(error).split())
    return None


def _check_shared_weights(model: PreTrainedModel) -> None:
    if any(is_partitioned(parameter) for parameter in model.parameters()):
        return
    try:
        remove_tied_weights_from_state_dict(model.state_dict(), model)
    except RuntimeError as error:
        raise ValueError(
            f"The model's weights cannot be saved: {' '.join(str(error).split())} Tie them as the model's class does "
            "(`config.tie_word_embeddings=True` and `model.tie_weights()`), or give each its own: "
            "`parameter.data = parameter.data.clone()`, or another `nn.Parameter` where it is one."
        ) from error
