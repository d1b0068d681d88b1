"""BlockMask: which key blocks each query block reads, and which tokens inside them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sparseattn import checks
from sparseattn.constants import BLOCK_STEP, EMPTY_BLOCK, FULL_BLOCK, MAX_BLOCK, MIN_BLOCK
from sparseattn.structures import token_bits as bits_of
from sparseattn.structures.block_lists import BlockLists, build_lists
from sparseattn.structures.selection import select_blocks

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask as FlexBlockMask

_OP = "BlockMask"


@dataclass(frozen=True, eq=False)
class BlockMask:
    """Which keys each query may attend to, at the grain of blocks.

    Queries are cut into R = ceil(q_len / block_q) blocks, keys into C = ceil(k_len / block_k). A
    block pair is empty, full (every token pair is visible) or partial (token bits say which).
    Both directions are kept: rows for the output and dq, columns for dk and dv.

    Example: two query blocks of four key blocks, row 0 reads blocks 0 and 3, row 1 reads block 1::

        BlockMask.from_dense(torch.tensor([[[[1, 0, 0, 1], [0, 1, 0, 0]]]]).bool(), 128, 256)

    A batch or head dimension of size 1 stands for all batch entries or heads. The value is frozen;
    ``to_dense()`` defines what it means. Memory: 4 bytes per entry of each list's capacity, and
    block_q * block_k / 8 bytes per partial block.

    Build it with ``from_dense``, ``from_block_scores``, ``from_token_mask``, ``window`` or
    ``from_flex``. The constructors check shapes and dtypes; ``validate()`` checks values, which
    waits for the device.
    """

    q_len: int
    k_len: int
    block_size: tuple[int, int]
    rows: BlockLists
    columns: BlockLists
    partial_rows: BlockLists | None = None
    partial_columns: BlockLists | None = None
    token_bits: Tensor | None = None

    def __post_init__(self) -> None:
        pair = check_geometry(self.q_len, self.k_len, self.block_size)
        if not isinstance(self.block_size, tuple):
            object.__setattr__(self, "block_size", pair)
        partial = (self.partial_rows, self.partial_columns, self.token_bits)
        if any(part is None for part in partial) and any(part is not None for part in partial):
            raise ValueError(
                f"{_OP}: partial_rows, partial_columns and token_bits are given in part; "
                "expected all three or none"
            )

    @property
    def batch(self) -> int:
        """Batch entries the mask tells apart: B, or 1 for a mask shared by all."""
        return self.rows.offsets.shape[0]

    @property
    def heads(self) -> int:
        """Heads the mask tells apart: H, or 1 for a mask shared by all."""
        return self.rows.offsets.shape[1]

    @property
    def num_q_blocks(self) -> int:
        """R, the number of query blocks."""
        return self.rows.num_lines

    @property
    def num_k_blocks(self) -> int:
        """C, the number of key blocks."""
        return self.columns.num_lines

    @property
    def device(self) -> torch.device:
        """The device of every tensor inside."""
        return self.rows.offsets.device

    def __repr__(self) -> str:
        """Describe the geometry without reading the device."""
        partial = "with" if self.token_bits is not None else "no"
        return (
            f"BlockMask(q_len={self.q_len}, k_len={self.k_len}, block_size={self.block_size}, "
            f"batch={self.batch}, heads={self.heads}, {partial} partial blocks, "
            f"device={str(self.device)!r})"
        )

    # -- constructors -------------------------------------------------------------------------

    @classmethod
    def from_dense(
        cls, blocks: Tensor, q_len: int, k_len: int, block_size: tuple[int, int] | int = (64, 64)
    ) -> BlockMask:
        """Keep the block pairs that are True in `blocks` (bool [B or 1, H or 1, R, C])."""
        geometry = check_geometry(q_len, k_len, block_size)
        _bind_blocks("blocks", blocks, q_len, k_len, geometry)
        checks.require_dtype(_OP, "blocks", blocks, torch.bool)
        rows, columns = build_lists(blocks, blocks.shape[2] * blocks.shape[3])
        return cls(q_len, k_len, geometry, rows, columns)

    @classmethod
    def from_block_scores(
        cls,
        scores: Tensor,
        keep: int | float,
        q_len: int,
        k_len: int,
        block_size: tuple[int, int] | int = (64, 64),
        always: Tensor | None = None,
    ) -> BlockMask:
        """Keep the `keep` key blocks of highest score in every row.

        Args:
            scores: floating point [B or 1, H or 1, R, C]. Ties go to the lowest block. A score of
                -inf or NaN is never kept, so a row may keep fewer blocks.
            keep: how many blocks a row keeps, at most C are kept; or the fraction of C, in (0, 1],
                rounded up.
            q_len: number of query tokens.
            k_len: number of key tokens.
            block_size: tokens in a query block and in a key block, multiples of 16 up to 256.
            always: bool, broadcastable to scores: blocks kept besides the top ones.

        Not differentiable with respect to the scores.
        """
        geometry = check_geometry(q_len, k_len, block_size)
        _bind_blocks("scores", scores, q_len, k_len, geometry)
        checks.require_floating(_OP, "scores", scores)
        num_columns = scores.shape[3]
        count = keep_count(keep, num_columns)
        capacity = scores.shape[2] * (count if always is None else num_columns)
        check_always(_OP, always, scores.shape, scores.device, "scores")
        on_device = scores.is_cuda and scores.dtype != torch.float64
        impl = "triton" if on_device else "torch"
        kept = select_blocks(scores.detach(), count, always=always, impl=impl)
        rows, columns = build_lists(kept, capacity)
        return cls(q_len, k_len, geometry, rows, columns)

    @classmethod
    def from_token_mask(
        cls,
        keep: Tensor,
        block_size: tuple[int, int] | int = (64, 64),
        *,
        q_len: int | None = None,
    ) -> BlockMask:
        """Keep the token pairs that are True in `keep`.

        Args:
            keep: bool [B or 1, H or 1, Nq, Nk], or [B, Nk]: the keys that every query sees.
            block_size: tokens in a query block and in a key block, multiples of 16 up to 256.
            q_len: number of query tokens; for the [B, Nk] form only, where it defaults to Nk.
        """
        from sparseattn.structures.tokens import from_token_mask

        return from_token_mask(keep, block_size, q_len)

    @classmethod
    def window(
        cls,
        shape: int | tuple[int, ...],
        radius: int | tuple[int, ...],
        *,
        block_size: tuple[int, int] | int = (64, 64),
        prefix: int = 0,
        device: torch.device | str | None = None,
    ) -> BlockMask:
        """Let every token see those at most `radius` away along every axis of a grid.

        Args:
            shape: tokens along each axis of a 1-D, 2-D or 3-D grid in raster order.
            radius: reach along each axis, in tokens; one number serves all axes.
            block_size: tokens in a query block and in a key block, multiples of 16 up to 256.
            prefix: class or register tokens before the grid; they see and are seen by all.
            device: where the mask is put; it is built on the host.
        """
        from sparseattn.structures.windows import window

        mask = window(shape, radius, block_size, prefix)
        return mask if device is None else mask.to(device)

    @classmethod
    def from_flex(cls, mask: FlexBlockMask) -> BlockMask:
        """Convert FlexAttention's BlockMask; its mask_mod is read into token bits, once."""
        from sparseattn.structures.flex import from_flex

        return from_flex(mask)

    @classmethod
    def from_states(
        cls,
        states: Tensor,
        token_bits: Tensor | None,
        q_len: int,
        k_len: int,
        block_size: tuple[int, int],
        capacity: tuple[int, int] | None = None,
    ) -> BlockMask:
        """Build the lists from ``block_states()`` and the token bits that its slots point to.

        capacity: how many full and how many partial blocks a head has at most; default R * C.
        """
        everything = states.shape[2] * states.shape[3]
        most_full, most_partial = capacity or (everything, everything)
        rows, columns = build_lists(states == FULL_BLOCK, most_full)
        if token_bits is None:
            return cls(q_len, k_len, block_size, rows, columns)
        partial_rows, partial_columns = build_lists(states >= 0, most_partial)
        partial_rows = _with_slots(partial_rows, states)
        partial_columns = _with_slots(partial_columns, states.mT)
        partial = (partial_rows, partial_columns, token_bits)
        return cls(q_len, k_len, block_size, rows, columns, *partial)

    # -- what it means ------------------------------------------------------------------------

    def block_states(self) -> Tensor:
        """Return int32 [B, H, R, C]: -1 empty, -2 full, else the slot of the block's token bits."""
        shape = (self.batch, self.heads, self.num_q_blocks, self.num_k_blocks)
        states = torch.full(shape, EMPTY_BLOCK, dtype=torch.int32, device=self.device)
        states = _put(states, self.rows, torch.full_like(self.rows.indices, FULL_BLOCK))
        if self.partial_rows is not None and self.partial_rows.slots is not None:
            states = _put(states, self.partial_rows, self.partial_rows.slots)
        return states

    def to_dense(self) -> Tensor:
        """Return the mask of token pairs, bool [B or 1, H or 1, q_len, k_len]: its definition."""
        states = self.block_states()
        block_q, block_k = self.block_size
        dense = (states == FULL_BLOCK)[..., :, None, :, None]
        dense = dense.expand(*states.shape[:3], block_q, states.shape[3], block_k)
        if self.token_bits is not None:
            tokens = bits_of.unpack(bits_of.fetch(self.token_bits, states), block_k)
            dense = dense | tokens.transpose(3, 4)
        return dense.flatten(4, 5).flatten(2, 3)[..., : self.q_len, : self.k_len]

    def density(self) -> Tensor:
        """Return the share of token pairs that are visible, a float64 scalar on the device."""
        from sparseattn.structures.tokens import visible_pairs

        pairs = visible_pairs(self).sum(dtype=torch.float64)
        return pairs / max(1, self.batch * self.heads * self.q_len * self.k_len)

    def validate(self) -> None:
        """Check every value; raise ValueError naming the first that is wrong. Waits for the device.

        The constructors make valid masks; this is for one assembled from lists by hand.
        """
        from sparseattn.structures.validation import validate

        validate(self)

    # -- other forms --------------------------------------------------------------------------

    def to_flex(self) -> FlexBlockMask:
        """Convert to FlexAttention's BlockMask; its mask_mod looks up this mask's blocks."""
        from sparseattn.structures.flex import to_flex

        return to_flex(self)

    def to(self, device: torch.device | str) -> BlockMask:
        """Return the mask with every tensor on `device`."""
        target = torch.device(device)
        return self.map(lambda tensor: tensor.to(target))

    def map(self, move: Callable[[Tensor], Tensor]) -> BlockMask:
        """Return the mask with every tensor passed through `move`."""
        return BlockMask(
            self.q_len,
            self.k_len,
            self.block_size,
            self.rows.map(move),
            self.columns.map(move),
            None if self.partial_rows is None else self.partial_rows.map(move),
            None if self.partial_columns is None else self.partial_columns.map(move),
            None if self.token_bits is None else move(self.token_bits),
        )

    def __or__(self, other: Any) -> BlockMask:
        """Return the union: a pair is visible if either mask shows it."""
        return self._combine(other, union=True)

    def __and__(self, other: Any) -> BlockMask:
        """Return the intersection: a pair is visible if both masks show it."""
        return self._combine(other, union=False)

    def _combine(self, other: Any, union: bool) -> BlockMask:
        from sparseattn.structures.tokens import combine

        if not isinstance(other, BlockMask):
            raise TypeError(f"{_OP}: other {checks.describe(other)}; expected a BlockMask")
        return combine(self, other, union)


def check_geometry(q_len: Any, k_len: Any, block_size: Any, op: str = _OP) -> tuple[int, int]:
    """Check lengths and block size; return the block size as a pair."""
    checks.require_int(op, "q_len", q_len, low=0)
    checks.require_int(op, "k_len", k_len, low=0)
    pair = (block_size, block_size) if isinstance(block_size, int) else block_size
    rule = f"one or two multiples of {BLOCK_STEP} from {MIN_BLOCK} to {MAX_BLOCK}"
    if not isinstance(pair, (tuple, list)) or not all(type(size) is int for size in pair):
        raise TypeError(f"{op}: block_size {checks.describe(block_size)}; expected {rule}")
    fits = all(MIN_BLOCK <= size <= MAX_BLOCK and size % BLOCK_STEP == 0 for size in pair)
    if len(pair) != 2 or not fits:
        raise ValueError(f"{op}: block_size is {block_size}; expected {rule}")
    return pair[0], pair[1]


def check_always(
    op: str, always: Any, shape: torch.Size, device: torch.device, source: str
) -> None:
    """Check the blocks that are kept whatever their score: bool that broadcasts to `shape`."""
    if always is None:
        return
    checks.require_tensor(op, "always", always)
    checks.require_dtype(op, "always", always, torch.bool)
    checks.require_device(op, "always", always, device, source)
    try:
        always.expand(shape)
    except RuntimeError as error:
        raise ValueError(
            f"{op}: always {checks.describe(always)}; expected a shape that broadcasts "
            f"to {list(shape)} (from {source})"
        ) from error


def keep_count(keep: Any, num_columns: int, op: str = _OP) -> int:
    """Return how many of `num_columns` blocks a row keeps: a count, or a fraction rounded up."""
    share = checks.keep_share(op, keep)
    if isinstance(share, tuple):
        return -(-num_columns * share[0] // share[1])
    return share if share < num_columns else num_columns


def _bind_blocks(
    name: str, blocks: Tensor, q_len: int, k_len: int, block_size: tuple[int, int]
) -> None:
    shapes = checks.Shapes(_OP)
    shapes.set("R", -(-q_len // block_size[0]), "q_len and block_size")
    shapes.set("C", -(-k_len // block_size[1]), "k_len and block_size")
    shapes.bind(name, blocks, "B H R C")


def _with_slots(lists: BlockLists, states: Tensor) -> BlockLists:
    place = lists.lines().long() * states.shape[3] + lists.indices
    last = max(0, states.shape[2] * states.shape[3] - 1)
    slots = states.flatten(2).gather(2, place.clamp(0, last))
    return BlockLists(lists.offsets, lists.indices, slots.clamp(min=0))


def _put(states: Tensor, lists: BlockLists, values: Tensor) -> Tensor:
    """Write one value per entry; entries past the last go to a spare place that is cut off."""
    spare = states.shape[2] * states.shape[3]
    lines = lists.lines()
    place = lines.long() * states.shape[3] + lists.indices
    place = torch.where(lines < lists.num_lines, place, spare)
    flat = torch.nn.functional.pad(states.flatten(2), (0, 1))
    return flat.scatter(2, place, values)[..., :spare].view(states.shape)
