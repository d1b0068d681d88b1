"""Checks of a block mask's values. They wait for the device."""

from __future__ import annotations

import torch
from torch import Tensor

from sparseattn.constants import BITS_PER_WORD
from sparseattn.structures import token_bits as bits_of
from sparseattn.structures.block_lists import BlockLists
from sparseattn.structures.block_mask import BlockMask


def validate(mask: BlockMask) -> None:
    """Raise ValueError naming the first list whose values are wrong."""
    num_rows = -(-mask.q_len // mask.block_size[0])
    num_columns = -(-mask.k_len // mask.block_size[1])
    pairs = [("rows", mask.rows, "columns", mask.columns)]
    if mask.partial_rows is not None and mask.partial_columns is not None:
        pairs.append(("partial_rows", mask.partial_rows, "partial_columns", mask.partial_columns))
    grids = []
    for row_name, rows, column_name, columns in pairs:
        by_row = _grid(row_name, rows, num_rows, num_columns)
        by_column = _grid(column_name, columns, num_columns, num_rows)
        _require(
            torch.equal(by_row, by_column.mT),
            f"{column_name} is not the transpose of {row_name}; expected the same blocks in both",
        )
        grids.append(by_row)
    if len(grids) == 2:
        _require(
            not bool((grids[0] & grids[1]).any()),
            "partial_rows lists a block that rows lists too; expected each block once",
        )
        _check_bits(mask)
        _check_slots(mask)


def _grid(name: str, lists: BlockLists, num_lines: int, num_ids: int) -> Tensor:
    """Check one list; return its blocks as bool [B, H, L, ids]."""
    offsets, indices = lists.offsets, lists.indices
    for part, tensor in (("offsets", offsets), ("indices", indices), ("slots", lists.slots)):
        if tensor is not None and tensor.dtype != torch.int32:
            raise TypeError(
                f"BlockMask: {name}.{part} has dtype {tensor.dtype}; expected torch.int32"
            )
    _require(
        lists.num_lines == num_lines, f"{name} has {lists.num_lines} lines; expected {num_lines}"
    )
    _require(bool((offsets[..., 0] == 0).all()), f"{name}.offsets starts above 0; expected 0")
    _require(bool((offsets.diff(dim=-1) >= 0).all()), f"{name}.offsets falls; expected ascending")
    end = int(offsets[..., -1].max()) if offsets.numel() else 0
    _require(
        end <= lists.capacity,
        f"{name}.offsets ends at {end}; expected at most the capacity, {lists.capacity}",
    )
    lines = lists.lines()
    used = lines < num_lines
    valid = ((indices >= 0) & (indices < num_ids)) | ~used
    _require(bool(valid.all()), f"{name}.indices leaves its range; expected 0 to {num_ids - 1}")
    ascending = (indices[..., 1:] > indices[..., :-1]) | (lines[..., 1:] != lines[..., :-1])
    _require(
        bool((ascending | ~used[..., 1:]).all()),
        f"{name}.indices does not rise within a line; expected ascending, each block once",
    )
    spare = num_lines * num_ids
    place = torch.where(used, lines.long() * num_ids + indices, spare)
    flat = torch.zeros((*offsets.shape[:2], spare + 1), dtype=torch.bool, device=offsets.device)
    return flat.scatter(2, place, True)[..., :spare].unflatten(2, (num_lines, num_ids))


def _check_bits(mask: BlockMask) -> None:
    """Token bits have one row per query of a block, and none for keys that do not exist."""
    bits = mask.token_bits
    if bits is None:
        raise ValueError("BlockMask: token_bits is None; expected a tensor")
    block_q, block_k = mask.block_size
    words = bits_of.words_per_row(block_k)
    fits = bits.dim() == 5 and tuple(bits.shape[3:]) == (block_q, words)
    fits = fits and bits.shape[0] in (1, mask.batch) and bits.shape[1] in (1, mask.heads)
    _require(
        fits,
        f"token_bits has shape {list(bits.shape)}; expected [B, H, slots, {block_q}, {words}], "
        f"B={mask.batch}, H={mask.heads} (from rows)",
    )
    columns = mask.partial_columns
    spare = bits_of.unpack(bits, words * BITS_PER_WORD)[..., block_k:].any()
    if columns is not None and columns.slots is not None and mask.k_len % block_k:
        in_last = columns.lines() == mask.num_k_blocks - 1
        slots = columns.slots.clamp(0, max(0, bits.shape[2] - 1)).long()
        pool = bits.expand(mask.batch, mask.heads, *bits.shape[2:])
        batch, head, entry = in_last.nonzero(as_tuple=True)
        last = bits_of.unpack(pool[batch, head, slots[batch, head, entry]], block_k)
        spare = spare | last[..., mask.k_len % block_k :].any()
    _require(
        not bool(spare),
        "token_bits shows a key past the end of its block; expected zero bits there",
    )


def _check_slots(mask: BlockMask) -> None:
    both = (("partial_rows", mask.partial_rows), ("partial_columns", mask.partial_columns))
    slots_by_block = []
    for name, lists in both:
        if lists is None or lists.slots is None or mask.token_bits is None:
            raise ValueError(f"BlockMask: {name}.slots is missing; expected one per entry")
        lines = lists.lines()
        used = lines < lists.num_lines
        valid = ((lists.slots >= 0) & (lists.slots < mask.token_bits.shape[2])) | ~used
        last = mask.token_bits.shape[2] - 1
        _require(bool(valid.all()), f"{name}.slots leaves its range; expected 0 to {last}")
        first, second = (lines, lists.indices) if name == "partial_rows" else (lists.indices, lines)
        key = first.long() * mask.num_k_blocks + second
        order = torch.where(used, key, torch.iinfo(torch.int64).max).argsort(dim=-1, stable=True)
        slots_by_block.append(torch.where(used, lists.slots, -1).gather(2, order))
    _require(
        torch.equal(*slots_by_block),
        "partial_columns.slots differs from partial_rows.slots; expected one slot per block",
    )


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ValueError(f"BlockMask: {message}")
