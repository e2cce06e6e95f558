"""The model card: what was trained how, and how to load it or train it again."""

from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import is_peft_model
from huggingface_hub import ModelCard, ModelCardData
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from ..auto_model import auto_class
from ..config import ESConfig
from ..images import text_of
from ..version import __version__


REWARD_PLOT = "reward.png"
TEMPLATE = Path(__file__).with_name("model_card.md")
SETTINGS = (
    "population_size",
    "population_size_schedule",
    "sigma",
    "learning_rate",
    "lr_scheduler_type",
    "perturbation",
    "perturbation_rank",
    "antithetic",
    "num_steps_per_population",
    "fitness_shaping",
    "es_optimizer",
    "weight_decay",
    "anchor_decay",
    "num_prompts_per_step",
    "num_prompts_per_step_schedule",
    "unique_prompts",
    "num_generations",
    "max_completion_length",
    "temperature",
    "master_weights",
    "seed",
)
PACKAGES = ("transformers", "torch", "trl", "datasets", "tokenizers")


def model_card(
    args: ESConfig,
    model: PreTrainedModel,
    processing_class: PreTrainedTokenizerBase | ProcessorMixin,
    dtype: torch.dtype,
    log_history: list[dict[str, Any]],
    name: str | None,
    repository: str | None,
    dataset: str | None,
    tags: list[str],
    reward_names: list[str],
    samples: list[tuple[Any, str, str]],
) -> ModelCard:
    """
    Args:
        args ([`ESConfig`]):
            How the model was trained.
        model ([`~transformers.PreTrainedModel`]):
            The model.
        processing_class ([`~transformers.PreTrainedTokenizerBase`] or [`~transformers.ProcessorMixin`]):
            Its tokenizer or processor.
        dtype (`torch.dtype`):
            Dtype that its trained weights had while it was trained.
        log_history (`list[dict]`):
            What was logged, as in [`~transformers.TrainerState`].
        name (`str`, *optional*):
            Name of the model. If `None`, that of the output folder.
        repository (`str`, *optional*):
            Where it is on the Hub.
        dataset (`str`, *optional*):
            Name of the dataset on the Hub.
        tags (`list[str]`):
            Tags.
        reward_names (`list[str]`):
            Names of the reward functions.
        samples (`list[tuple]`):
            Prompts, and what the model answered before and after.
    """
    base = model.config._name_or_path
    is_peft = is_peft_model(model)
    architecture = type(model.get_base_model() if is_peft else model).__name__
    has_processor = isinstance(processing_class, ProcessorMixin)
    name = name or Path(args.output_dir).name
    rewards = [log["reward"] for log in log_history if log.get("reward") is not None]
    data = ModelCardData(
        base_model=base if base and not Path(base).exists() else None,
        datasets=dataset,
        library_name="peft" if is_peft else "transformers",
        model_name=name,
        pipeline_tag="image-text-to-text" if has_processor else "text-generation",
        tags=tags,
    )
    return ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        name=name,
        base=base or type(model).__name__,
        base_on_hub=data.base_model is not None,
        model_id=repository or args.output_dir,
        on_hub=repository is not None,
        dataset=dataset,
        is_peft=is_peft,
        model_class=auto_class(model.config, architecture).__name__,
        processing_class="processor" if has_processor else "tokenizer",
        steps=max((log["step"] for log in log_history), default=0),
        settings={name: value for name, value in args.to_dict().items() if name in SETTINGS},
        dtype=str(dtype).removeprefix("torch."),
        reward_names=reward_names,
        rewards=rewards,
        picture=REWARD_PLOT if (Path(args.output_dir) / REWARD_PLOT).is_file() else None,
        samples=[tuple(map(_cell, sample)) for sample in samples],
        versions={"es_trainer": __version__, **{package: version(package) for package in PACKAGES}},
    )


def _cell(entry: str | list[dict[str, Any]]) -> str:
    """Text for a cell of a Markdown table; of a conversation, its last message."""
    text = entry if isinstance(entry, str) else text_of(entry[-1]["content"])
    for mark, escaped in (("&", "&amp;"), ("<", "&lt;"), ("|", "\\|")):
        text = text.replace(mark, escaped)
    return "<br>".join(text.splitlines())
