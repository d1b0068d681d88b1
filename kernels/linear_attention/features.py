"""Device helpers of linear attention: the feature map and its derivative, one tile of tokens."""

import triton
import triton.language as tl


@triton.jit
def feature(x, MAP: tl.constexpr):
    """Return elu(x) + 1, max(x, 0) or x."""
    if MAP == "elu":
        x = tl.where(x > 0.0, x + 1.0, tl.exp(tl.minimum(x, 0.0)))
    elif MAP == "relu":
        x = tl.maximum(x, 0.0)
    return x


@triton.jit
def vanishes(below):
    """Say which denominators are 0, or so small (no normal float32) that their inverse is none."""
    return tl.abs(below) < 1.1754943508222875e-38


@triton.jit
def slope(f, MAP: tl.constexpr):
    """Return the derivative of the feature map where its value is f: x need not be kept for it."""
    if MAP == "elu":
        f = tl.minimum(f, 1.0)  # x + 1 is at least 1, and exp(x) its own derivative
    elif MAP == "relu":
        f = tl.where(f > 0.0, 1.0, 0.0)
    else:
        f = tl.full(f.shape, 1.0, tl.float32)
    return f


@triton.jit
def load_tokens(ptr, start, stride, is_shown, first, D: tl.constexpr, BLOCK_N: tl.constexpr,
                COLUMNS: tl.constexpr):  # fmt: skip
    """Load [BLOCK_N, COLUMNS] in float32; zero past column D and for hidden tokens."""
    columns = first + tl.arange(0, COLUMNS)[None, :]
    at = (start + tl.arange(0, BLOCK_N)).to(tl.int64)[:, None] * stride
    kept = is_shown[:, None] & (columns < D)
    return tl.load(ptr + at + columns, mask=kept, other=0.0).to(tl.float32)


@triton.jit
def store_tokens(ptr, start, stride, x, length, first, D: tl.constexpr, BLOCK_N: tl.constexpr,
                 COLUMNS: tl.constexpr):  # fmt: skip
    """Store [BLOCK_N, COLUMNS] from column `first` on, of the tokens before `length`.

    The mask is made here: one made for the loads would fill registers until then.
    """
    tokens = tl.arange(0, BLOCK_N)[:, None]
    columns = first + tl.arange(0, COLUMNS)[None, :]
    kept = (tokens < length - start) & (columns < D)
    ptr += start.to(tl.int64) * stride + tokens.to(tl.int64) * stride
    tl.store(ptr + columns, x.to(ptr.dtype.element_ty), mask=kept)


@triton.jit
def load_S(ptr, first, D: tl.constexpr, BLOCK_D: tl.constexpr, COLUMNS: tl.constexpr):
    """Load columns of S, [BLOCK_D, COLUMNS], of one head's sums [D, D + 1]."""
    rows = tl.arange(0, BLOCK_D)[:, None]
    columns = first + tl.arange(0, COLUMNS)[None, :]
    kept = (rows < D) & (columns < D)
    return tl.load(ptr + rows * (D + 1) + columns, mask=kept, other=0.0)


@triton.jit
def load_z(ptr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Load z [BLOCK_D] of one head's sums [D, D + 1]."""
    rows = tl.arange(0, BLOCK_D)
    return tl.load(ptr + rows * (D + 1) + D, mask=rows < D, other=0.0)
