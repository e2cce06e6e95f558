"""Rewards by a model that scores text."""

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerBase
from trl.data_utils import apply_chat_template, is_conversational

from ..data import refuse_images
from ..deepspeed_config import unpartitioned
from ..weights.layouts.zero3 import is_partitioned


if TYPE_CHECKING:
    from ..config import ESConfig


class RewardModel:
    """
    Reward function that is the first logit of a sequence classification model.

    It reads the prompt and the completion, rendered with the chat template of the model's tokenizer if they are
    conversational.

    Args:
        model (`str` or [`~transformers.PreTrainedModel`]):
            Name or folder of a model, loaded with `num_labels=1` and `args.model_init_kwargs`, or a loaded model. Each
            process has a whole one.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Its tokenizer. If `None`, it is loaded by the model's name.
        args ([`ESConfig`]):
            Says where the model comes from and on which device it is.

    Raises:
        `ValueError`: If the model's weights are partitioned over processes.
    """

    def __init__(self, model: str | nn.Module, tokenizer: PreTrainedTokenizerBase | None, args: "ESConfig"):
        options = {"trust_remote_code": args.trust_remote_code, **(args.model_init_kwargs or {})}
        revision = None
        if isinstance(model, str):
            revision = options.get("revision")
            with unpartitioned():
                model = AutoModelForSequenceClassification.from_pretrained(model, num_labels=1, **options)
        elif any(is_partitioned(parameter) for parameter in model.parameters()):
            raise ValueError(
                f"The reward model {type(model).__name__} is partitioned by DeepSpeed ZeRO-3, because it was loaded "
                "after the configuration was made. Give its name instead, or load it before."
            )
        if tokenizer is None:
            tokenizer = AutoTokenizer.from_pretrained(
                model.config._name_or_path, revision=revision, trust_remote_code=args.trust_remote_code
            )
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        model.config.get_text_config().pad_token_id = tokenizer.pad_token_id  # it scores the last token before padding
        self.tokenizer = tokenizer
        self.chat_template_kwargs = args.chat_template_kwargs or {}
        self.model = model.to(args.device).eval()

    @torch.inference_mode()
    def __call__(self, prompts: list[Any], completions: list[Any], **kwargs: Any) -> list[float]:
        refuse_images(prompts, "reward models read texts. Take the model out of `reward_funcs`")
        if is_conversational({"prompt": prompts[0]}):
            conversations = ({"messages": p + c} for p, c in zip(prompts, completions, strict=True))
            texts = [
                apply_chat_template(conversation, self.tokenizer, **self.chat_template_kwargs)["text"]
                for conversation in conversations
            ]
        else:
            texts = [p + c for p, c in zip(prompts, completions, strict=True)]
        inputs = self.tokenizer(
            text=texts, return_tensors="pt", padding=True, padding_side="right", add_special_tokens=False
        )
        return self.model(**inputs.to(self.model.device)).logits[:, 0].tolist()
