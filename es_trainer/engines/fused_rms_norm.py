"""
RMS norms with the weights of many members in one launch, in Triton.

A program normalizes one token. A token gets the same bits whatever else is in the batch.
"""

import torch
import triton
import triton.language as tl


MOST_COLUMNS = 2048  # that a program works on at once


# The number of tokens is no reason for a kernel of its own, which could add in another order
@triton.jit(do_not_specialize=["tokens"])
def rms_norm_kernel(x, out, weights, members, tokens, eps, width, block: tl.constexpr):
    program = tl.program_id(0).to(tl.int64)  # a batch may have more than 2**31 activations
    member = tl.load(members + program // tokens).to(tl.int64)
    x, out, weights = x + program * width, out + program * width, weights + member * width
    columns = tl.arange(0, block)

    squares = tl.zeros((block,), tl.float32)
    for start in range(0, width, block):
        values = tl.load(x + start + columns, mask=start + columns < width, other=0.0).to(tl.float32)
        squares += values * values
    factor = tl.rsqrt(tl.sum(squares, 0) / width + eps)

    for start in range(0, width, block):
        mask = start + columns < width
        values = tl.load(x + start + columns, mask=mask).to(tl.float32) * factor
        values = values.to(x.dtype.element_ty).to(tl.float32)  # as models do
        values *= tl.load(weights + start + columns, mask=mask).to(tl.float32)
        tl.store(out + start + columns, values.to(out.dtype.element_ty), mask=mask)


def rms_norm(x: torch.Tensor, weights: torch.Tensor, members: torch.Tensor, eps: float) -> torch.Tensor:
    """
    Normalize each token and multiply it with the weights of its row's member, in one launch.

    Args:
        x (`torch.Tensor` of shape `(rows, tokens, width)`):
            Activations.
        weights (`torch.Tensor` of shape `(members, width)`):
            Each member's weights.
        members (`torch.Tensor` of shape `(rows,)`):
            Member of each row.
        eps (`float`):
            Added to the mean of the squares.

    Returns:
        `torch.Tensor` of shape `(rows, tokens, width)`, of the dtype of `x`.
    """
    x = x.contiguous()
    out = torch.empty_like(x)
    rows, tokens, width = x.shape
    # Triton launches on the current device, which need not be that of the activations
    with torch.cuda.device_of(x):
        block = min(MOST_COLUMNS, 1 << (width - 1).bit_length())
        # Whether multiplications are fused with additions by default depends on Triton's version
        rms_norm_kernel[(rows * tokens,)](x, out, weights, members, tokens, eps, width, block, enable_fp_fusion=True)
    return out
