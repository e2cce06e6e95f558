"""Whether Triton interprets is decided when it is first imported, so each way gets a process of its own."""

import os
import subprocess
import sys
from pathlib import Path


TESTS = Path(__file__).parent


def run(*arguments: str, interpret: bool) -> None:
    """Run Python in a process that imports the tests' modules, with kernels interpreted or compiled."""
    paths = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "TRITON_INTERPRET": str(int(interpret)), "PYTHONPATH": paths}
    process = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stdout + process.stderr


def run_checks(checks: Path, interpret: bool) -> None:
    """Run a file of checks."""
    run("-m", "pytest", "--noconftest", "-q", str(checks), interpret=interpret)
