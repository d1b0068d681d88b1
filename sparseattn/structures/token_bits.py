"""Packed token masks of partial blocks: 32 keys to an int32 word, lowest bit first.

    token_bits [B, H, P, block_q, words]   int32, words = ceil(block_k / 32)

Key j of row i of a block in slot s is visible when bit j % 32 of token_bits[s, i, j // 32] is set.
Bits of keys past the end of the sequence are zero.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparseattn.constants import BITS_PER_WORD


def words_per_row(block_k: int) -> int:
    """Return how many int32 words hold one row of a block."""
    return -(-block_k // BITS_PER_WORD)


def pack(keep: Tensor) -> Tensor:
    """Pack bool [..., block_k] into int32 [..., words]."""
    spare = -keep.shape[-1] % BITS_PER_WORD
    if spare:
        keep = torch.nn.functional.pad(keep, (0, spare))
    octets = keep.contiguous().view(torch.uint8).unflatten(-1, (-1, 8))
    packed = octets[..., 0].clone(memory_format=torch.contiguous_format)
    for bit in range(1, 8):
        packed |= octets[..., bit] << bit
    return packed.view(torch.int32)


def unpack(bits: Tensor, block_k: int) -> Tensor:
    """Unpack int32 [..., words] into bool [..., block_k]."""
    if bits.stride(-1) != 1 or not bits.is_contiguous():
        bits = bits.clone(memory_format=torch.contiguous_format)
    octets = bits.view(torch.uint8)
    place = torch.arange(8, dtype=torch.uint8, device=bits.device)
    keep = (octets[..., None] >> place) & 1
    return keep.flatten(-2)[..., :block_k].view(torch.bool)


def popcount(bits: Tensor) -> Tensor:
    """Return the number of set bits of every int32 word, as int32."""
    pairs = bits - ((bits >> 1) & 0x55555555)
    fours = (pairs & 0x33333333) + ((pairs >> 2) & 0x33333333)
    octets = (fours + (fours >> 4)) & 0x0F0F0F0F
    # the sum of the four octets lands in the top one; it is at most 32, so the sign stays clear
    return (octets * 0x01010101) >> 24


def fetch(token_bits: Tensor, states: Tensor) -> Tensor:
    """Return the words of every block, zero unless it is partial.

    states: int32 [B, H, ...], values of ``BlockMask.block_states()``.
    Returns int32 [B, H, ..., block_q, words].
    """
    batch, heads = states.shape[:2]
    slots = states.flatten(2).clamp(min=0).long()
    pool = token_bits.expand(batch, heads, *token_bits.shape[2:])
    batch_at = torch.arange(batch, device=states.device)[:, None, None]
    head_at = torch.arange(heads, device=states.device)[:, None]
    if token_bits.shape[2] == 0:
        words = token_bits.new_zeros((*slots.shape, *token_bits.shape[3:]))
    else:
        words = pool[batch_at, head_at, slots]  # [B, H, entries, block_q, words]
    words = words * (states.flatten(2) >= 0)[..., None, None]
    return words.unflatten(2, states.shape[2:])
