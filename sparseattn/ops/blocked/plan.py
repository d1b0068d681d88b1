"""Which query blocks are computed together, and with which gathered key blocks."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sparseattn.kernels.launch import IndexLists

# Keys of a slab where keys or queries are strided or ragged.
SLAB_KEYS = 4096


@dataclass(frozen=True)
class Problem:
    """One call's inputs."""

    q: Tensor
    k: Tensor
    v: Tensor
    key_bias: Tensor | None
    block_gate: Tensor | None
    rows: IndexLists
    token_bits: Tensor | None
    block_size: tuple[int, int]
    scale: float

    @cached_property
    def has_empty_rows(self) -> bool:
        """Whether some row of the mask keeps no block."""
        counts = self.rows.offsets.diff()
        if self.rows.partial_offsets is not None:
            counts = counts + self.rows.partial_offsets.diff()
        return not bool(counts.all())

    @property
    def group(self) -> int:
        """Query heads per key head."""
        return self.q.shape[1] // self.k.shape[1]

    @cached_property
    def padded_bias(self) -> Tensor | None:
        """key_bias as [B, 1 or H, C, block_k] in the accumulation dtype, -inf past the last key."""
        if self.key_bias is None:
            return None
        block_k = self.block_size[1]
        bias = self.key_bias.to(accumulate_dtype(self.q.dtype))
        bias = torch.nn.functional.pad(bias, (0, -bias.shape[2] % block_k), value=-math.inf)
        return bias.unflatten(2, (-1, block_k))


class Slab(NamedTuple):
    """Batch entries b0 to b1 and key heads g0 to g1, computed with one table of key blocks."""

    b0: int
    b1: int
    g0: int
    g1: int


class Run(NamedTuple):
    """Query blocks with equally long lists.

    batch, head, row    [n] each: where they are
    columns  [n, e]     the columns of the mask that they keep, partial blocks first
    slots    [n, p]     token bits of the first p entries
    """

    batch: Tensor
    head: Tensor
    row: Tensor
    columns: Tensor
    slots: Tensor


class Chunk(NamedTuple):
    """A part of a run, small enough for the cache.

    lines    [n]        which query blocks of the slab: a slice if they follow each other
    ids      [n, e]     their key blocks in the slab's table
    """

    run: Run
    part: slice
    lines: Tensor | slice
    ids: Tensor

    def where(self, batches: int, heads: int) -> tuple[Tensor, Tensor]:
        """Return batch and head, [n, 1] each, as indices: 0 where the indexed tensor has one."""
        batch, head = (x[self.part, None] for x in (self.run.batch, self.run.head))
        return batch * (batches > 1), head * (heads > 1)

    @property
    def row(self) -> Tensor:
        """Rows of the mask, [n]."""
        return self.run.row[self.part]

    @property
    def columns(self) -> Tensor:
        """Columns of the mask, [n, e]."""
        return self.run.columns[self.part]

    @property
    def slots(self) -> Tensor:
        """Token bits of the partial blocks, [n, p]."""
        return self.run.slots[self.part]


def split(run: Run, lines: Tensor | slice, ids: Tensor, size: int) -> Iterator[Chunk]:
    """Cut a run into chunks of at most `size` query blocks."""
    for at in range(0, ids.shape[0], size):
        part = slice(at, min(at + size, ids.shape[0]))
        if isinstance(lines, slice):
            chosen: Tensor | slice = slice(lines.start + part.start, lines.start + part.stop)
        else:
            chosen = lines[part]
        yield Chunk(run, part, chosen, ids[part])


def take(table: Tensor, chunk: Chunk) -> Tensor:
    """Return the chunk's lines of a query table; do not write to it."""
    if isinstance(chunk.lines, slice):
        return table[chunk.lines]
    return table.index_select(0, chunk.lines)


def put(table: Tensor, chunk: Chunk, value: Tensor) -> None:
    """Write the chunk's lines of a query table, unless `value` was made in their place."""
    if isinstance(chunk.lines, slice):
        lines = table[chunk.lines]
        if lines.data_ptr() != value.data_ptr():
            lines.copy_(value)
    else:
        table.index_copy_(0, chunk.lines, value)


def place(table: Tensor, chunk: Chunk, scratch: Scratch) -> Tensor:
    """Return where to make what is put into the chunk's lines: the lines themselves if they can."""
    if isinstance(chunk.lines, slice):
        return table[chunk.lines]
    return scratch.take("lines", (chunk.ids.shape[0], *table.shape[1:]), table.dtype)


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of sums and of lse: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@cache
def settle_exp() -> None:
    """Let one thread alone make the first call of exp and log in this process.

    Intel's library chooses its code at the first call. Where two threads made that together, one of
    them got a version with errors of 3e-5, in a quarter of fresh processes (docs/log.md).
    """
    for dtype in (torch.float32, torch.float64):
        torch.ones(16, dtype=dtype).exp_().log_()


class Scratch:
    """Memory that the chunks of one call use in turn: fresh pages for each would cost more time."""

    def __init__(self, device: torch.device) -> None:
        settle_exp()
        self._device = device
        self._buffers: dict[tuple[str, torch.dtype], Tensor] = {}

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return what was taken under this name before, in a new shape; it holds anything."""
        size = math.prod(shape)
        buffer = self._buffers.pop((name, dtype), None)
        if buffer is None or buffer.numel() < size:
            del buffer  # before its larger successor is made
            buffer = torch.empty(size, dtype=dtype, device=self._device)
        self._buffers[name, dtype] = buffer
        return buffer[:size].view(shape)

    def copy(self, name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """Return `tensor` in `dtype`: itself if it has it, else a copy under this name."""
        if tensor.dtype == dtype:
            return tensor
        return self.take(name, tuple(tensor.shape), dtype).copy_(tensor)


def gather(
    table: Tensor, ids: Tensor, hidden: Tensor | None, scratch: Scratch, name: str
) -> Tensor:
    """Gather key blocks: [blocks, bk, D] at [n, e] -> [n, e * bk, D], 0 where `hidden`."""
    block_k, head_dim = table.shape[1:]
    blocks = scratch.take(name, (ids.numel(), block_k * head_dim), table.dtype)
    torch.index_select(table.flatten(1), 0, ids.flatten(), out=blocks)
    gathered = blocks.view(ids.shape[0], ids.shape[1] * block_k, head_dim)
    return gathered if hidden is None else gathered.masked_fill_(hidden, 0)


def slabs(problem: Problem, sums: bool) -> Iterator[Slab]:
    """Cut batch and key heads into slabs that are computed one after the other.

    A slab bounds what is copied at a time. Tensors that lie in whole blocks need no copy and form
    one slab; others are cut to about SLAB_KEYS keys, at least one head. So are 16-bit tensors
    where gradients are summed (`sums`), since the sums are float32.
    """
    batch, heads, k_len, _ = problem.k.shape
    if k_len == 0 or problem.q.shape[2] == 0 or problem.q.shape[1] == 0:
        return
    whole = all(t.is_contiguous() for t in (problem.q, problem.k, problem.v))
    whole &= problem.q.shape[2] % problem.block_size[0] == 0 and k_len % problem.block_size[1] == 0
    whole &= not sums or problem.q.dtype == accumulate_dtype(problem.q.dtype)
    if whole:
        yield Slab(0, batch, 0, heads)
        return
    fit = max(1, SLAB_KEYS // k_len)
    if fit >= heads:
        step = max(1, fit // heads)
        yield from (Slab(b, min(b + step, batch), 0, heads) for b in range(0, batch, step))
        return
    for b in range(batch):
        yield from (Slab(b, b + 1, g, min(g + fit, heads)) for g in range(0, heads, fit))


def chunks(
    problem: Problem, slab: Slab, most_keys: int, has_logits: bool = True
) -> Iterator[Chunk]:
    """Yield the slab's query blocks in chunks of equally long lists; empty ones are left out.

    A chunk gathers at most so many keys, for 64 queries a block: fewer for larger blocks if they
    have logits in memory. If they have none, they are for torch's fused attention, which gives a
    query block to one thread: then a chunk has a block for each, however long their lists are.
    """
    block_q, block_k = problem.block_size
    num_rows = -(-problem.q.shape[2] // block_q)
    num_columns = -(-problem.k.shape[2] // block_k)
    group, device, threads = problem.group, problem.q.device, torch.get_num_threads()
    heads = (slab.g1 - slab.g0) * group
    batch, head, row = np.unravel_index(
        np.arange((slab.b1 - slab.b0) * heads * num_rows), (slab.b1 - slab.b0, heads, num_rows)
    )
    table = (batch * (slab.g1 - slab.g0) + head // group) * num_columns
    batch, head = batch + slab.b0, head + slab.g0 * group
    full = _HostLists(problem.rows.offsets, problem.rows.indices, None)
    starts, counts = full.lines(batch, head, row)
    partial_starts, partial_counts = starts, np.zeros_like(counts)
    partial = None
    if problem.rows.partial_offsets is not None:
        indices, slots_of = problem.rows.partial_indices, problem.rows.partial_slots
        partial = _HostLists(problem.rows.partial_offsets, indices, slots_of)
        partial_starts, partial_counts = partial.lines(batch, head, row)
    cut = np.zeros_like(counts)  # lines with a ragged block apart: they alone need a mask for it
    if problem.k.shape[2] % block_k and full.indices.size:
        last = np.maximum(starts + counts - 1, 0)[:, None]
        cut = counts * (full.entries(batch, head, last[:, 0], 1)[0][:, 0] == num_columns - 1)
        cut = (cut > 0).astype(counts.dtype)
    order = np.lexsort((cut, counts, partial_counts)) if counts.size else counts
    order = order[(counts + partial_counts)[order] > 0]
    lengths = np.stack((partial_counts, counts, cut), 1)[order]
    edges = np.flatnonzero(np.diff(lengths, axis=0).any(1)) + 1
    least, taller = (1, max(block_q, 64)) if has_logits else (threads, 64)
    for run in np.split(order, edges):
        if not run.size:
            continue
        p, f = int(partial_counts[run[0]]), int(counts[run[0]])
        where = (batch[run], head[run])
        columns = full.entries(*where, starts[run], f)[0]
        slots = np.zeros((run.size, 0), np.int64)
        if partial is not None and p:
            first, slots = partial.entries(*where, partial_starts[run], p)
            columns = np.concatenate((first, columns), 1)
        ids = torch.from_numpy(table[run][:, None] + columns).to(device)
        parts = (*where, row[run], columns, slots)
        alike = Run(*(torch.from_numpy(part).to(device) for part in parts))
        follow = run[-1] - run[0] + 1 == run.size  # each run ascends
        lines = slice(int(run[0]), int(run[-1]) + 1) if follow else torch.from_numpy(run).to(device)
        size = max(least, most_keys * 64 // ((p + f) * block_k * taller))
        size -= size % threads if size > threads else 0  # an odd one out would keep one waiting
        yield from split(alike, lines, ids, size)


class _HostLists:
    """Lists read on the host."""

    def __init__(self, offsets: Tensor, indices: Tensor | None, slots: Tensor | None) -> None:
        self.offsets = offsets.cpu().numpy()
        self.indices = np.zeros((1, 1, 0), np.int32) if indices is None else indices.cpu().numpy()
        self.slots = None if slots is None else slots.cpu().numpy()

    def lines(
        self, batch: np.ndarray, head: np.ndarray, row: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return where the lists of these rows start, and how long they are."""
        batch, head = self._shared(batch, head)
        starts = self.offsets[batch, head, row].astype(np.int64)
        return starts, self.offsets[batch, head, row + 1] - starts

    def entries(
        self, batch: np.ndarray, head: np.ndarray, starts: np.ndarray, count: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the columns [n, count] and the slots [n, count] of lists that start there."""
        batch, head = self._shared(batch, head)
        place = (batch[:, None], head[:, None], starts[:, None] + np.arange(count))
        columns = self.indices[place].astype(np.int64)
        slots = columns if self.slots is None else self.slots[place].astype(np.int64)
        return columns, slots

    def _shared(self, batch: np.ndarray, head: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """A mask of one batch entry or head serves all."""
        batches, heads = self.offsets.shape[:2]
        return (
            batch if batches > 1 else np.zeros_like(batch),
            head if heads > 1 else np.zeros_like(head),
        )
