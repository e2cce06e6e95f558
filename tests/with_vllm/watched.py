"""A worker that counts the bytes of the models that it loads and of the tensors that it keeps."""

import gc
from typing import Any

import torch
from transformers import PreTrainedModel

from es_trainer.rollout.vllm_worker import WorkerExtension


class Watched(WorkerExtension):
    loaded = 0

    def bytes(self) -> dict[str, Any]:
        gc.collect()
        tensors = (found for found in gc.get_objects() if isinstance(found, torch.Tensor) and found.numel())
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
        return {"loaded": self.loaded, "kept": sum(storages.values())}

    def _load(self, *args: Any) -> PreTrainedModel:
        model = super()._load(*args)
        self.loaded += sum(parameter.nbytes for parameter in model.parameters())
        return model
