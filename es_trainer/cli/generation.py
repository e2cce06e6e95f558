"""Completions of saved models."""

from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from .. import auto_model
from ..config import ESConfig
from ..engines import TransformersEngine
from ..engines.generation_config import check_generation_kwargs
from ..engines.vocabulary import require_pad_token, tokenizer_of
from ..loading import load_processing_class
from ..rollout import Completion


class Generator(TransformersEngine):
    """
    A saved model that answers prompts.

    Args:
        name (`str`):
            Name, or folder, of a model or PEFT adapter.
        config ([`ESConfig`]):
            How to load it and how it generates.
        adapter (`Path`, *optional*):
            Folder of a PEFT adapter to add to it.
    """

    def __init__(self, name: str, config: ESConfig, adapter: Path | None = None):
        check_generation_kwargs(config)
        options = {"trust_remote_code": config.trust_remote_code, **config.model_init_kwargs}
        processing_class = load_processing_class(name, options)
        require_pad_token(tokenizer_of(processing_class))
        # It loads adapters, too, with the model that they name
        model = auto_model.from_pretrained(name, **options)
        if adapter is not None:
            model.load_adapter(str(adapter))
        super().__init__(model.to(config.device), processing_class, config)
        self.name = name if adapter is None else str(adapter)
        self.config = config

    def answer(self, prompts: list[Any], num_samples: int = 1) -> list[Completion]:
        """`num_samples` completions of the first prompt, then of the second, and so on."""
        ids = self.tokenize(prompts)
        with tqdm(total=len(ids) * num_samples, desc=f"Completions of {self.name}") as self.bar:
            return self.generate(ids, self.config.seed, num_samples, batch_size=self.config.generation_batch_size)

    def _generate_batch(self, prompt_ids: Any, rows: Any, *args: Any) -> list[Completion]:
        completions = super()._generate_batch(prompt_ids, rows, *args)
        self.bar.update(len(rows))
        return completions
