"""FlexAttention's BlockMask, both ways."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sparseattn import checks
from sparseattn.constants import BITS_PER_WORD, EMPTY_BLOCK, FULL_BLOCK
from sparseattn.structures import token_bits as bits_of
from sparseattn.structures.block_lists import BlockLists
from sparseattn.structures.block_mask import BlockMask, check_geometry

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask as FlexBlockMask


def to_flex(mask: BlockMask) -> FlexBlockMask:
    """Build ``BlockMask.to_flex``: the same blocks, and a mask_mod that looks tokens up."""
    from torch.nn.attention.flex_attention import BlockMask as FlexBlockMask

    states = mask.block_states()
    block_q, block_k = mask.block_size
    words = mask.token_bits
    if words is None or words.shape[2] == 0:
        words = torch.zeros(
            (1, 1, 1, block_q, bits_of.words_per_row(block_k)),
            dtype=torch.int32,
            device=mask.device,
        )
    words = words.expand(mask.batch, mask.heads, *words.shape[2:])
    batch_step, head_step = int(mask.batch > 1), int(mask.heads > 1)

    def mask_mod(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        batch, head = batch * batch_step, head * head_step
        state = states[batch, head, query // block_q, key // block_k]
        bit = key % block_k
        word = words[batch, head, state.clamp(min=0), query % block_q, bit // BITS_PER_WORD]
        shown = (word >> (bit % BITS_PER_WORD)) & 1
        return (state == FULL_BLOCK) | ((state >= 0) & (shown == 1))

    full_counts, full_indices = _padded(mask.rows, mask.num_k_blocks)
    if mask.partial_rows is None:
        counts, indices = torch.zeros_like(full_counts), torch.zeros_like(full_indices)
    else:
        counts, indices = _padded(mask.partial_rows, mask.num_k_blocks)
    return FlexBlockMask.from_kv_blocks(
        counts,
        indices,
        full_counts,
        full_indices,
        BLOCK_SIZE=mask.block_size,
        mask_mod=mask_mod,
        seq_lengths=(mask.q_len, mask.k_len),
    )


def from_flex(mask: Any) -> BlockMask:
    """Build ``BlockMask.from_flex``: mask_mod is evaluated once, a query block at a time."""
    from torch.nn.attention.flex_attention import BlockMask as FlexBlockMask
    from torch.nn.attention.flex_attention import create_mask

    if not isinstance(mask, FlexBlockMask):
        raise TypeError(
            f"BlockMask.from_flex: mask {checks.describe(mask)}; "
            "expected a torch.nn.attention.flex_attention.BlockMask"
        )
    q_len, k_len = mask.seq_lengths
    geometry = check_geometry(q_len, k_len, tuple(mask.BLOCK_SIZE))
    block_q, block_k = geometry
    num_columns = -(-k_len // block_k)
    partial = _flex_blocks(mask.kv_num_blocks, mask.kv_indices, num_columns)
    full = torch.zeros_like(partial)
    if mask.full_kv_num_blocks is not None and mask.full_kv_indices is not None:
        full = _flex_blocks(mask.full_kv_num_blocks, mask.full_kv_indices, num_columns)
    batch, heads, num_rows, _ = partial.shape
    partial &= ~full
    order = partial.flatten(2).cumsum(2, dtype=torch.int32).view(partial.shape) - 1
    states = torch.where(partial, order, EMPTY_BLOCK)
    states = torch.where(full, FULL_BLOCK, states).to(torch.int32)
    slots = int(partial.flatten(2).sum(2).max()) if partial.numel() else 0
    shape = (batch, heads, slots, block_q, bits_of.words_per_row(block_k))
    words = torch.zeros(shape, dtype=torch.int32, device=partial.device)
    for row in range(num_rows if k_len else 0):
        start = row * block_q

        def shifted(b: Tensor, h: Tensor, q: Tensor, k: Tensor, start: int = start) -> Tensor:
            return mask.mask_mod(b, h, q + start, k)

        size = min(block_q, q_len - start)
        shown = create_mask(shifted, batch, heads, size, k_len, device=str(partial.device))
        spare = (0, num_columns * block_k - k_len, 0, block_q - size)
        shown = torch.nn.functional.pad(shown, spare).unflatten(3, (num_columns, block_k))
        packed = bits_of.pack(shown).transpose(2, 3)  # [B, H, C, bq, words]
        b, h, column = partial[:, :, row].nonzero(as_tuple=True)
        words[b, h, order[b, h, row, column].long()] = packed[b, h, column]
    return BlockMask.from_states(states, words if slots else None, q_len, k_len, geometry)


def _padded(lists: BlockLists, width: int) -> tuple[Tensor, Tensor]:
    """Return counts [B, H, L] and indices [B, H, L, width] as FlexAttention keeps them."""
    counts = lists.counts()
    place = torch.arange(width, dtype=torch.int32, device=counts.device)
    entry = lists.offsets[..., :-1, None] + place
    entry = torch.where(place < counts[..., None], entry, 0)
    if lists.capacity == 0:
        return counts, torch.zeros_like(entry)
    indices = lists.indices.gather(2, entry.flatten(2).long()).view(entry.shape)
    return counts, indices.clamp(min=0)


def _flex_blocks(counts: Tensor, indices: Tensor, num_columns: int) -> Tensor:
    """Return the listed blocks as bool [B, H, R, C]."""
    place = torch.arange(indices.shape[-1], device=indices.device)
    column = torch.where(place < counts[..., None], indices.long(), num_columns)
    blocks = torch.zeros((*counts.shape, num_columns + 1), dtype=torch.bool, device=indices.device)
    return blocks.scatter(-1, column, True)[..., :num_columns]
