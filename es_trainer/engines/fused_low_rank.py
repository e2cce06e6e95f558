"""
Low-rank terms of many members in one launch, in Triton.

A program reads one token's activations and the right factor of its member, and adds the product of the result with
the left factor to the token's outputs. Additions are made in float32 and in an order that depends on the sizes of the
factors alone: a token gets the same bits whatever else is in the batch.
"""

import functools

import torch
import triton
import triton.language as tl


TILE = 2048  # values of a factor that a program works on at once
PROGRAMS = 4096  # that keep a large GPU busy: with fewer tokens, several programs share the outputs of each
ALIGNMENT = tl.constexpr(16)  # multiples of so many bytes can be read and written as vectors


@triton.jit
def tile_of(factor, ranks, columns, rank_stride, stride, rank, width):
    """Columns of a factor in float32, with zeros beyond its rank and width."""
    mask = (ranks < rank)[:, None] & (columns < width)[None, :]
    tile = tl.load(factor + ranks[:, None] * rank_stride + columns[None, :] * stride, mask=mask, other=0.0)
    return tile.to(tl.float32)


# Numbers that differ between batches are no reason for a kernel of their own, which could add in another order
@triton.jit(do_not_specialize=["tokens", "x_row", "x_token", "out_row", "out_token"])
def low_rank_kernel(
    x,
    out,
    left,
    right,
    members,
    tokens,
    x_row,
    x_token,
    x_stride,
    out_row,
    out_token,
    out_stride,
    left_member,
    left_rank,
    left_stride,
    right_member,
    right_rank,
    right_stride,
    x_width,
    out_width,
    rank: tl.constexpr,
    ranks: tl.constexpr,
    x_block: tl.constexpr,
    out_block: tl.constexpr,
    aligned: tl.constexpr,
):
    # 64 bits: a batch may have more than 2**31 activations
    program = tl.program_id(0).to(tl.int64)
    row = program // tokens
    token = program - row * tokens
    member = tl.load(members + row).to(tl.int64)
    x += row * x_row + token * x_token
    out += row * out_row + token * out_token
    if aligned:  # which Triton does not find out by itself of numbers that it does not specialize on
        x, out = tl.multiple_of(x, ALIGNMENT), tl.multiple_of(out, ALIGNMENT)
    left += member * left_member
    right += member * right_member
    every_rank = tl.arange(0, ranks).to(tl.int64)

    columns = tl.arange(0, x_block).to(tl.int64)
    sums = tl.zeros((ranks, x_block), tl.float32)
    for start in range(0, x_width, x_block):
        column = start + columns
        values = tl.load(x + column * x_stride, mask=column < x_width, other=0.0).to(tl.float32)
        sums += values[None, :] * tile_of(right, every_rank, column, right_rank, right_stride, rank, x_width)
    inner = tl.sum(sums, 1)

    columns = tl.arange(0, out_block).to(tl.int64)
    for start in range(tl.program_id(1) * out_block, out_width, tl.num_programs(1) * out_block):
        column = start + columns
        term = tl.sum(inner[:, None] * tile_of(left, every_rank, column, left_rank, left_stride, rank, out_width), 0)
        place, mask = out + column * out_stride, column < out_width
        total = tl.load(place, mask=mask).to(tl.float32) + term
        tl.store(place, total.to(out.dtype.element_ty), mask=mask)


def add_low_rank(
    x: torch.Tensor, out: torch.Tensor, left: torch.Tensor, right: torch.Tensor, members: torch.Tensor
) -> None:
    """
    Add each row's `x @ right[member].T @ left[member]` to `out`, in one launch.

    Args:
        x (`torch.Tensor` of shape `(rows, tokens, in)`):
            Activations.
        out (`torch.Tensor` of shape `(rows, tokens, out)`):
            What the shared weights make of them.
        left (`torch.Tensor` of shape `(members, rank, out)`):
            Left factors.
        right (`torch.Tensor` of shape `(members, rank, in)`):
            Right factors.
        members (`torch.Tensor` of shape `(rows,)`):
            Member of each row.
    """
    rows, tokens, width = x.shape
    _, rank, out_width = left.shape
    ranks, x_block, out_block = _blocks(rank, width, out_width)
    shares = min(-(-out_width // out_block), -(-PROGRAMS // (rows * tokens)))
    # Triton launches on the current device, which need not be that of the activations
    with torch.cuda.device_of(x):
        low_rank_kernel[(rows * tokens, shares)](
            x,
            out,
            left,
            right,
            members,
            tokens,
            *x.stride(),
            *out.stride(),
            *left.stride(),
            *right.stride(),
            width,
            out_width,
            rank,
            ranks,
            x_block,
            out_block,
            _is_aligned(x) and _is_aligned(out),
            enable_fp_fusion=True,  # whether that is the default depends on Triton's version
        )


@functools.cache  # a launch for each layer and token: Triton's own arithmetic would take longer than the rest
def _blocks(rank: int, width: int, out_width: int) -> tuple[int, int, int]:
    """Ranks and columns that a program works on at once, of both factors: they decide in which order is added."""
    ranks = triton.next_power_of_2(rank)
    most = max(1, TILE // ranks)
    return ranks, min(triton.next_power_of_2(width), most), min(triton.next_power_of_2(out_width), most)


def _is_aligned(activations: torch.Tensor) -> bool:
    """Whether those of all tokens can be read as vectors."""
    row, token, _ = activations.stride()
    return (activations.data_ptr() | (row | token) * activations.element_size()) % ALIGNMENT.value == 0
