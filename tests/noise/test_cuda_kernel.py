"""The Triton kernel: interpreted on any machine, compiled for GPUs on any machine, run where there is one."""

from pathlib import Path

import pytest
import torch
from triton_process import run, run_checks


CHECKS = Path(__file__).with_name("triton_checks.py")

COMPILE = """
import re

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from es_trainer.noise import cuda


def compile(kernel, **constants):
    for capability in (80, 90):
        source = ASTSource(kernel, {"table": "*i64"} | dict.fromkeys(constants, "constexpr"), constants)
        yield triton.compile(source, target=GPUTarget("cuda", capability, 32)).asm["ptx"]


def widest(ptx):
    return max(int(width or 1) for width in re.findall(r"st\\.global(?:\\.v(\\d))?\\.b\\d", ptx))


single, half = tl.float32, tl.bfloat16
for source, target in [(single, half), (half, half), (tl.float16, tl.float16), (None, single)]:
    for stochastic in (False, True):
        for aligned in (False, True):
            shared = {"source_type": source, "target_type": target, "stochastic": stochastic, "aligned": aligned}
            for jobs in (1, 512):
                for ptx in compile(cuda.add_kernel, jobs=jobs, **shared):
                    assert (widest(ptx) > 1) == aligned, (shared, jobs)
                for width in (1, 128):
                    tile = {"height": 4096 // width, "width": width}
                    for ptx in compile(cuda.product_kernel, jobs=jobs, **shared, **tile):
                        assert width == 1 or (widest(ptx) > 1) == aligned, (shared, jobs)
"""


def test_in_the_interpreter():
    run_checks(CHECKS, interpret=True)


def test_compiles():
    run("-c", COMPILE, interpret=False)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu():
    run_checks(CHECKS, interpret=False)
