"""The kernels of population batches: interpreted on any machine, compiled for GPUs on any machine, run where there is
one.
"""

from pathlib import Path

import pytest
import torch
from triton_process import run, run_checks


CHECKS = Path(__file__).with_name("fused_checks.py")

# By the way that a launch goes, up to the launch itself
COMPILE = """
import re
import subprocess
import tempfile

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from es_trainer.engines import fused_low_rank, fused_rms_norm


class Card:
    capability = 80

    def get_current_target(self):
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self):
        return self.capability

    def get_current_stream(self, device):
        return 0


class Compiled:
    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        return lambda *args, **options: made.append(self.kernel.warmup(*args, grid=grid, **options))


def widest(kernel, what):
    found = re.findall(what + r"\\.global[\\w.:]*?(?:\\.v(\\d))?\\.b(\\d+)", kernel.asm["ptx"])
    return max(int(count or 1) * int(bits) for count, bits in found)


def assert_same(kernels):
    assert len({kernel.asm["ptx"] for kernel in kernels}) == 1, "the order of additions could depend on the batch"


def assert_keeps_registers(kernel):
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert re.search(r"REG:\\d+ STACK:0 .*LOCAL:0 ", usage), usage


card, made = Card(), []
driver.set_active(card)
fused_low_rank.low_rank_kernel = Compiled(fused_low_rank.low_rank_kernel)
fused_rms_norm.rms_norm_kernel = Compiled(fused_rms_norm.rms_norm_kernel)
BATCHES = [(1, 1), (240, 1), (3, 64), (16, 17)]  # rows and tokens
for card.capability in (80, 90):
    for dtype in (torch.float32, torch.bfloat16):
        for rank, width, out_width in [(1, 896, 4864), (1, 896, 151936), (5, 4864, 896), (64, 896, 896), (1, 127, 3)]:
            made.clear()
            for shape in BATCHES:
                x, out = (torch.empty(*shape, size, dtype=dtype) for size in (width, out_width))
                left, right = (torch.empty(30, rank, size, dtype=dtype) for size in (out_width, width))
                fused_low_rank.add_low_rank(x, out, left, right, torch.zeros(len(x), dtype=torch.long))
            assert_same(made)
            assert (widest(made[0], "ld") == 128) == (width % 16 == 0), (dtype, rank, width)
            assert rank > 1 or (widest(made[0], "st") == 128) == (width % 16 == 0), (dtype, rank, width)
            assert_keeps_registers(made[0])
        for offset, row in ((0, 902), (1, 896)):
            x = torch.empty(offset + 3 * row, dtype=dtype)[offset:].view(3, 1, row)[..., :896]
            made.clear()
            factors = torch.empty(2, 30, 1, 897, dtype=dtype)[..., :896]
            fused_low_rank.add_low_rank(x, torch.empty_like(x), *factors, torch.zeros(3, dtype=torch.long))
            assert widest(made[0], "ld") == 64, "rows that begin anywhere cannot be read as vectors"
        for width in (896, 3584, 127):
            made.clear()
            for shape in BATCHES:
                x, weights = torch.empty(*shape, width, dtype=dtype), torch.empty(30, width)
                fused_rms_norm.rms_norm(x, weights, torch.zeros(len(x), dtype=torch.long), 1e-6)
            assert_same(made)
            assert (widest(made[0], "ld") == widest(made[0], "st") == 128) == (width % 16 == 0), (dtype, width)
            assert_keeps_registers(made[0])
"""


def test_in_the_interpreter():
    run_checks(CHECKS, interpret=True)


def test_compiles():
    run("-c", COMPILE, interpret=False)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu():
    run_checks(CHECKS, interpret=False)
