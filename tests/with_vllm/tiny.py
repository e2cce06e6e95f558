"""A tiny model that vLLM's CPU attention takes, and engines as small."""

import functools
import os
import tempfile


os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

from conftest import make_model, make_tokenizer
from vllm import LLM

from es_trainer.engines.vllm_worker import WorkerExtension


HEADS = {"head_dim": 32}  # vLLM's CPU attention knows no shorter ones


@functools.cache
def tiny_folder() -> str:
    folder = tempfile.mkdtemp(prefix="tiny-")
    make_model(**HEADS).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def start_llm(folder: str, dtype: str = "float32", **options) -> LLM:
    extension = f"{WorkerExtension.__module__}.{WorkerExtension.__name__}"
    options = {"enforce_eager": True, "max_model_len": 256, "worker_extension_cls": extension, **options}
    return LLM(model=folder, dtype=dtype, **options)
