"""Ascending index lists of a grid of booleans, by counting: serves every block mask.

    counts[l] = number of kept blocks in line l;   offsets = exclusive running sum of counts
    indices[offsets[l] + rank of c in line l] = c

Each line is written by one program in order: no sort, no atomics, no wait for the device. A line is
a row; pass the transposed grid for columns.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

PAD_INDEX = -1
LINES, CHUNK = 32, 128  # a program's tile of the grid


@triton.jit(do_not_specialize=["num_heads", "num_lines", "num_ids", "num_tiles"])
def block_lists_count_kernel(
    blocks_ptr, counts_ptr, strides, num_heads, num_lines, num_ids, num_tiles,
    LINES: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Count the kept blocks of every line. One program: LINES lines of one head."""
    head_at = (tl.program_id(0) // num_tiles).to(tl.int64)
    lines = (tl.program_id(0) % num_tiles) * LINES + tl.arange(0, LINES)
    line_ok = lines < num_lines
    blocks_ptr += (head_at // num_heads) * strides[0] + (head_at % num_heads) * strides[1]
    rows = blocks_ptr + lines[:, None].to(tl.int64) * strides[2]
    counts = tl.zeros([LINES], tl.int32)
    for start in range(0, num_ids, CHUNK):
        ids = start + tl.arange(0, CHUNK)[None, :]
        kept = tl.load(
            rows + ids.to(tl.int64) * strides[3], mask=line_ok[:, None] & (ids < num_ids), other=0
        )
        counts += tl.sum((kept != 0).to(tl.int32), 1)
    tl.store(counts_ptr + head_at * num_lines + lines, counts, mask=line_ok)


@triton.jit(do_not_specialize=["num_heads", "num_lines", "num_ids", "num_tiles", "capacity"])
def block_lists_write_kernel(
    blocks_ptr, offsets_ptr, indices_ptr, strides,
    num_heads, num_lines, num_ids, num_tiles, capacity,
    LINES: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Write the kept ids of every line, ascending. One program: LINES lines of one head."""
    head_at = (tl.program_id(0) // num_tiles).to(tl.int64)
    lines = (tl.program_id(0) % num_tiles) * LINES + tl.arange(0, LINES)
    line_ok = lines < num_lines
    blocks_ptr += (head_at // num_heads) * strides[0] + (head_at % num_heads) * strides[1]
    rows = blocks_ptr + lines[:, None].to(tl.int64) * strides[2]
    at = tl.load(offsets_ptr + head_at * (num_lines + 1) + lines, mask=line_ok, other=0)
    for start in range(0, num_ids, CHUNK):
        ids = start + tl.arange(0, CHUNK)[None, :]
        kept = tl.load(
            rows + ids.to(tl.int64) * strides[3], mask=line_ok[:, None] & (ids < num_ids), other=0
        )
        kept = (kept != 0).to(tl.int32)  # [LINES, CHUNK]
        place = at[:, None] + tl.cumsum(kept, 1) - kept
        target = indices_ptr + head_at * capacity + place
        tl.store(target, ids + tl.zeros_like(place), mask=(kept != 0) & (place < capacity))
        at += tl.sum(kept, 1)


def build(blocks: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
    """Return offsets [B, H, L + 1] and indices [B, H, capacity], int32, of bool [B, H, L, ids].

    Any strides. Entries past a head's last are PAD_INDEX; entries past the capacity are lost.
    """
    batch, heads, num_lines, num_ids = blocks.shape
    offsets = blocks.new_zeros((batch, heads, num_lines + 1), dtype=torch.int32)
    indices = blocks.new_full((batch, heads, capacity), PAD_INDEX, dtype=torch.int32)
    if blocks.numel() == 0:
        return offsets, indices
    octets = blocks.view(torch.uint8)
    counts = blocks.new_empty((batch, heads, num_lines), dtype=torch.int32)
    num_tiles = triton.cdiv(num_lines, LINES)
    grid = (batch * heads * num_tiles,)
    sizes = (octets.stride(), heads, num_lines, num_ids, num_tiles)
    with torch.cuda.device_of(blocks):
        block_lists_count_kernel[grid](octets, counts, *sizes, LINES=LINES, CHUNK=CHUNK)
        torch.cumsum(counts, -1, dtype=torch.int32, out=offsets[..., 1:])
        block_lists_write_kernel[grid](
            octets, offsets, indices, *sizes, capacity, LINES=LINES, CHUNK=CHUNK
        )
    return offsets, indices
