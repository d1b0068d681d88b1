"""Token masks as block masks: from a bool mask, and how two masks combine."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparseattn import checks
from sparseattn.constants import EMPTY_BLOCK, FULL_BLOCK
from sparseattn.structures import token_bits as bits_of
from sparseattn.structures.block_lists import build_lists
from sparseattn.structures.block_mask import BlockMask, check_geometry

_OP = "BlockMask"
_ALL_BITS = -1  # an int32 word with every bit set


def from_token_mask(keep: Any, block_size: Any, q_len: int | None) -> BlockMask:
    """Build ``BlockMask.from_token_mask``."""
    checks.require_tensor(_OP, "keep", keep)
    checks.require_dtype(_OP, "keep", keep, torch.bool)
    if keep.dim() == 2:
        q_len = keep.shape[1] if q_len is None else q_len
        geometry = check_geometry(q_len, keep.shape[1], block_size)
        return _from_key_mask(keep, geometry, q_len)
    if q_len is not None:
        raise ValueError(f"{_OP}: q_len is {q_len}; expected None, since keep has its own Nq")
    if keep.dim() != 4:
        raise ValueError(f"{_OP}: keep {checks.describe(keep)}; expected [B, H, Nq, Nk] or [B, Nk]")
    geometry = check_geometry(keep.shape[2], keep.shape[3], block_size)
    block_q, block_k = geometry
    tokens = _split_blocks(_split_blocks(keep, 3, block_k), 2, block_q)  # [B, H, R, bq, C, bk]
    kept = tokens.sum((3, 5), dtype=torch.int32)
    q_sizes = _block_sizes(keep.shape[2], block_q, keep.device)
    k_sizes = _block_sizes(keep.shape[3], block_k, keep.device)
    num_rows, num_columns = kept.shape[2:]
    slots = torch.arange(num_rows * num_columns, dtype=torch.int32, device=keep.device)
    slots = slots.view(num_rows, num_columns).expand(kept.shape)
    states = torch.where(kept > 0, slots, EMPTY_BLOCK)
    states = torch.where((kept > 0) & (kept == q_sizes[:, None] * k_sizes), FULL_BLOCK, states)
    words = bits_of.pack(tokens).transpose(3, 4).flatten(2, 3).contiguous()
    return BlockMask.from_states(
        states.to(torch.int32), words, keep.shape[2], keep.shape[3], geometry
    )


def _from_key_mask(keep: Tensor, geometry: tuple[int, int], q_len: int) -> BlockMask:
    """All queries see the same keys: the rows of a block share their bits, and so do the rows."""
    block_q, block_k = geometry
    tokens = _split_blocks(keep, 1, block_k)  # [B, C, bk]
    kept = tokens.sum(2, dtype=torch.int32)[:, None, None]  # [B, 1, 1, C]
    num_rows, num_columns = -(-q_len // block_q), kept.shape[3]
    slots = torch.arange(num_columns, dtype=torch.int32, device=keep.device)
    states = torch.where(kept > 0, slots, EMPTY_BLOCK)
    sizes = _block_sizes(keep.shape[1], block_k, keep.device)
    states = torch.where((kept > 0) & (kept == sizes), FULL_BLOCK, states).to(torch.int32)
    states = states.expand(-1, -1, num_rows, -1)
    words = bits_of.pack(tokens)[:, None, :, None]  # [B, 1, C, 1, words]
    words = words.expand(-1, -1, -1, block_q, -1)
    return BlockMask.from_states(states, words, q_len, keep.shape[1], geometry)


def combine(left: BlockMask, right: BlockMask, union: bool) -> BlockMask:
    """Return the union or the intersection of two masks of the same geometry."""
    for name in ("q_len", "k_len", "block_size", "device"):
        mine, theirs = getattr(left, name), getattr(right, name)
        if mine != theirs:
            raise ValueError(
                f"{_OP}: other has {name}={theirs}; expected {name}={mine} (from self)"
            )
    shape = _common_shape(left, right)
    first, second = left.block_states().expand(shape), right.block_states().expand(shape)
    geometry = (left.q_len, left.k_len, left.block_size)
    if union:
        full = (first == FULL_BLOCK) | (second == FULL_BLOCK)
        empty = (first == EMPTY_BLOCK) & (second == EMPTY_BLOCK)
    else:
        full = (first == FULL_BLOCK) & (second == FULL_BLOCK)
        empty = (first == EMPTY_BLOCK) | (second == EMPTY_BLOCK)
    states = torch.where(full, FULL_BLOCK, EMPTY_BLOCK).to(torch.int32)
    everything = shape[2] * shape[3]
    partial_lists = [m.partial_rows for m in (left, right) if m.partial_rows is not None]
    if not partial_lists:
        return BlockMask.from_states(states, None, *geometry)
    # a partial result has a partial operand, so their capacities bound how many there are
    capacity = min(everything, sum(lists.capacity for lists in partial_lists))
    entries, _ = build_lists(~full & ~empty, capacity)
    lines = entries.lines()
    place = torch.where(lines < shape[2], lines.long() * shape[3] + entries.indices, everything)
    words = [_entry_words(mask, state, place) for mask, state in ((left, first), (right, second))]
    slots = torch.arange(capacity, dtype=torch.int32, device=left.device).expand(place.shape)
    padded = torch.nn.functional.pad(states.flatten(2), (0, 1))
    states = padded.scatter(2, place, slots)[..., :everything].view(shape)
    merged = words[0] | words[1] if union else words[0] & words[1]
    return BlockMask.from_states(states, merged, *geometry, (everything, capacity))


def visible_pairs(mask: BlockMask) -> Tensor:
    """Return how many token pairs each block shows, int32 [B, H, R, C]."""
    states = mask.block_states()
    q_sizes = _block_sizes(mask.q_len, mask.block_size[0], mask.device)
    k_sizes = _block_sizes(mask.k_len, mask.block_size[1], mask.device)
    pairs = (states == FULL_BLOCK) * (q_sizes[:, None] * k_sizes)
    if mask.token_bits is None:
        return pairs
    if mask.token_bits.shape[2] == 0 or pairs.numel() == 0:
        return pairs
    counts = bits_of.popcount(mask.token_bits).sum(-1)  # [B, H, slots, bq]
    last = int(mask.q_len - (mask.num_q_blocks - 1) * mask.block_size[0])
    shape = (*states.shape[:2], counts.shape[2])
    slots = states.clamp(min=0).long()
    whole, ragged = (
        counts[..., :rows].sum(-1, dtype=torch.int32).expand(shape) for rows in (None, last)
    )
    shown = whole.gather(2, slots.flatten(2)).view(states.shape)
    shown[:, :, -1] = ragged.gather(2, slots[:, :, -1])
    return pairs + shown * (states >= 0)


def _entry_words(mask: BlockMask, states: Tensor, place: Tensor) -> Tensor:
    """Return the token bits of the blocks at `place`: all set in a full one, none in an empty."""
    at = torch.nn.functional.pad(states.flatten(2), (0, 1), value=EMPTY_BLOCK).gather(2, place)
    block_q, block_k = mask.block_size
    full = torch.where(at == FULL_BLOCK, _ALL_BITS, 0).to(torch.int32)[..., None, None]
    if mask.token_bits is None:
        return full.expand(*at.shape, block_q, bits_of.words_per_row(block_k))
    return bits_of.fetch(mask.token_bits, at) | full


def _common_shape(left: BlockMask, right: BlockMask) -> tuple[int, int, int, int]:
    try:
        batch, heads = torch.broadcast_shapes((left.batch, left.heads), (right.batch, right.heads))
    except RuntimeError as error:
        raise ValueError(
            f"{_OP}: other has batch={right.batch}, heads={right.heads}; expected sizes that "
            f"broadcast with batch={left.batch}, heads={left.heads} (from self)"
        ) from error
    return batch, heads, left.num_q_blocks, left.num_k_blocks


def _split_blocks(tokens: Tensor, dim: int, block: int) -> Tensor:
    """Pad dimension `dim` with False to whole blocks and split it into [blocks, block]."""
    size = tokens.shape[dim]
    count = -(-size // block)
    after = (0, 0) * (tokens.dim() - 1 - dim)
    return torch.nn.functional.pad(tokens, (*after, 0, count * block - size)).unflatten(
        dim, (count, block)
    )


def _block_sizes(length: int, block: int, device: torch.device) -> Tensor:
    """Return how many tokens each block holds, int32; the last may be short."""
    starts = torch.arange(0, length, block, dtype=torch.int32, device=device)
    return (length - starts).clamp(max=block)
