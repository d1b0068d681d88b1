"""Device helpers that two kernels or more share.

A head dim D is held as two chunks of D0 and D1 columns (D1 is 0 for most), so that 72 costs
64 + 16 and not 128. Chunk 1 is an alias of chunk 0 where D1 is 0; no code reads it then.
"""

import triton
import triton.language as tl


@triton.jit
def in_elements(strides, STEP: tl.constexpr):
    """Return batch, head and row strides that are given in units of STEP elements.

    So the compiler knows that STEP divides them, and loads vectors of rows of 40 or 72 too.
    """
    return strides[0] * STEP, strides[1] * STEP, strides[2] * STEP


@triton.jit
def load_chunk(
    ptr,
    row_stride,
    row_ok,
    FIRST: tl.constexpr,
    COLUMNS: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    CHECK_ROWS: tl.constexpr,
):
    """Load [ROWS, COLUMNS] from column FIRST on; zero past column D and where row_ok is false."""
    columns = FIRST + tl.arange(0, COLUMNS)
    ptrs = ptr + tl.arange(0, ROWS)[:, None] * row_stride + columns[None, :]
    HAS_SPARE: tl.constexpr = FIRST + COLUMNS > D
    if CHECK_ROWS and HAS_SPARE:
        chunk = tl.load(ptrs, mask=row_ok[:, None] & (columns < D)[None, :], other=0.0)
    elif CHECK_ROWS:
        chunk = tl.load(ptrs, mask=row_ok[:, None], other=0.0)
    elif HAS_SPARE:
        chunk = tl.load(ptrs, mask=(columns < D)[None, :], other=0.0)
    else:
        chunk = tl.load(ptrs)
    return chunk


@triton.jit
def load_rows(
    ptr,
    row_stride,
    row_ok,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    CHECK_ROWS: tl.constexpr,
):
    """Load ROWS rows of D columns as two chunks."""
    first = load_chunk(ptr, row_stride, row_ok, 0, D0, D, ROWS, CHECK_ROWS)
    if D1 > 0:
        second = load_chunk(ptr, row_stride, row_ok, D0, D1, D, ROWS, CHECK_ROWS)
    else:
        second = first
    return first, second


@triton.jit
def load_tile(
    source,
    place,
    first,
    row_stride,
    row_ok,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    CHECK_ROWS: tl.constexpr,
    IS_TMA: tl.constexpr,
):
    """Load ROWS rows from row `first` on, of one head's pointer or of a descriptor [B, H, N, D].

    A descriptor needs the batch entry and head in `place`, reads zeros past the last row, and
    knows no row_ok.
    """
    if IS_TMA:
        at = [place[0].to(tl.int32), place[1].to(tl.int32), first, 0]
        chunk = source.load(at).reshape([ROWS, D0])
        return chunk, chunk
    else:
        rows = source + first.to(tl.int64) * row_stride
        return load_rows(rows, row_stride, row_ok, ROWS, D, D0, D1, CHECK_ROWS)


@triton.jit
def store_rows(
    ptr,
    row_stride,
    count,
    first,
    second,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
):
    """Store two chunks as the first `count` of ROWS rows of D columns.

    The mask is made here: one made before the main loop would fill registers all through it.
    """
    row_ok = tl.arange(0, ROWS) < count
    rows = ptr + tl.arange(0, ROWS)[:, None] * row_stride
    columns = tl.arange(0, D0)[None, :]
    kept = row_ok[:, None] & (columns < D)
    tl.store(rows + columns, first.to(ptr.dtype.element_ty), mask=kept)
    if D1 > 0:
        columns = D0 + tl.arange(0, D1)[None, :]
        kept = row_ok[:, None] & (columns < D)
        tl.store(rows + columns, second.to(ptr.dtype.element_ty), mask=kept)


@triton.jit
def dot_rows(a0, a1, b0, b1, D1: tl.constexpr, PRECISION: tl.constexpr):
    """Return a @ b.T in float32, both held as chunks of columns."""
    product = tl.dot(a0, tl.trans(b0), input_precision=PRECISION)
    if D1 > 0:
        product = tl.dot(a1, tl.trans(b1), product, input_precision=PRECISION)
    return product


@triton.jit
def add_dot(acc0, acc1, weights, b0, b1, D1: tl.constexpr, PRECISION: tl.constexpr):
    """Return acc + weights @ b, chunk by chunk; weights are rounded to the dtype of b."""
    weights = weights.to(b0.dtype)
    acc0 = tl.dot(weights, b0, acc0, input_precision=PRECISION)
    if D1 > 0:
        acc1 = tl.dot(weights, b1, acc1, input_precision=PRECISION)
    return acc0, acc1


@triton.jit
def zero_chunks(ROWS: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr):
    """Return float32 zeros for two chunks; the second is a stand-in where D1 is 0."""
    first = tl.zeros([ROWS, D0], tl.float32)
    if D1 > 0:
        second = tl.zeros([ROWS, D1], tl.float32)
    else:
        second = tl.zeros([16, 16], tl.float32)
    return first, second


@triton.jit
def token_is_visible(
    bits_ptr,
    row_stride,
    first_key,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):
    """Return which of a partial block's pairs are visible, [ROWS, KEYS] or transposed.

    bits_ptr points at the tile's first row; the tile's keys start at key `first_key` of the block,
    a multiple of 16. One word of a row holds 32 keys.
    """
    rows = bits_ptr + tl.arange(0, ROWS) * row_stride
    keys = first_key % 32 + tl.arange(0, KEYS)
    word_of_key = keys // 32
    if TRANSPOSED:
        words = tl.zeros([KEYS, ROWS], tl.int32)
    else:
        words = tl.zeros([ROWS, KEYS], tl.int32)
    for word in tl.static_range((KEYS + 31) // 32):
        loaded = tl.load(rows + first_key // 32 + word)
        if TRANSPOSED:
            words = tl.where(word_of_key[:, None] == word, loaded[None, :], words)
        else:
            words = tl.where(word_of_key[None, :] == word, loaded[:, None], words)
    if TRANSPOSED:
        place = (keys % 32)[:, None]
    else:
        place = (keys % 32)[None, :]
    return ((words >> place) & 1) == 1


@triton.jit
def list_range(offsets_ptr, line, TILES: tl.constexpr):
    """Return where a line's entries begin and end, each entry counted as TILES tiles."""
    begin = tl.load(offsets_ptr + line)
    end = tl.load(offsets_ptr + line + 1)
    return begin * TILES, end * TILES


@triton.jit
def ragged_tile(
    indices_ptr, first, last, num_blocks, length, MASK_BLOCK: tl.constexpr, TILES: tl.constexpr
):
    """Return the first tile of a list that may reach past `length`; `last` if there is none.

    Lists ascend, so only the last entry can be the sequence's last, ragged block.
    """
    block = tl.load(indices_ptr + tl.maximum(last // TILES - 1, 0), mask=last > first, other=-1)
    is_ragged = (block == num_blocks - 1) & (length % MASK_BLOCK != 0)
    return tl.where(is_ragged, last - TILES, last)
