"""The Triton kernel: interpreted on any machine, compiled for GPUs on any machine, run where there is one.

Whether Triton interprets is decided when it is first imported, so each way gets a process of its own.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch


CHECKS = Path(__file__).with_name("triton_checks.py")

COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from es_trainer.noise import cuda


def compile(kernel, given):
    constants = {name: value for name, value in given.items() if not isinstance(value, str)}
    signature = {name: "constexpr" if name in constants else value for name, value in given.items()}
    for capability in (80, 90):
        triton.compile(ASTSource(kernel, signature, constants), target=GPUTarget("cuda", capability, 32))


# What the launcher makes of a tensor's dtype, of None, of large numbers and of the number 1
for source, target, start, members in [
    ("*fp32", "*bf16", "i32", "i32"),
    ("*bf16", "*bf16", "i64", 1),
    ("*fp16", "*fp16", 1, "i32"),
    (None, "*fp32", "i32", 1),
]:
    for stochastic in (False, True):
        given = {"source": source, "target": target, "size": "i32", "start": start, "keys": "*u64"}
        compile(cuda.add_kernel, given | {"coefficients": "*fp32", "members": members, "stochastic": stochastic})
        given |= {"left": "*fp32", "right": "*fp32", "rows": start, "columns": "i32", "terms": members, "first": start}
        for width in (1, 128):
            tile = {"stochastic": stochastic, "height": 4096 // width, "width": width}
            compile(cuda.product_kernel, given | tile)
"""


def run(*arguments: str, interpret: bool) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": str(int(interpret))}
    process = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stdout + process.stderr


def run_checks(interpret: bool) -> None:
    run("-m", "pytest", "--noconftest", "-q", str(CHECKS), interpret=interpret)


def test_in_the_interpreter():
    run_checks(interpret=True)


def test_compiles():
    run("-c", COMPILE, interpret=False)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu():
    run_checks(interpret=False)
