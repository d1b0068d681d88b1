"""What an attention op would do with inputs of some shape, before it is called."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch

from sparseattn import checks
from sparseattn.layers import break_even
from sparseattn.ops import dispatch
from sparseattn.ops.block_sparse_attention import Impl
from sparseattn.ops.token_selection import keep_capacity
from sparseattn.ops.work import (
    Work,
    attention_work,
    floor_seconds,
    linear_work,
    linformer_work,
    nystrom_work,
    performer_work,
)
from sparseattn.structures.block_mask import BlockMask, check_geometry, keep_count

_OP = "explain"
_KEEPING = ("block_sparse_attention", "saliency_attention", "topk_attention")
_LANDMARKS = {"linformer_attention": 256, "nystrom_attention": 64, "performer_attention": 256}
OPS = (*_KEEPING, "linear_attention", *_LANDMARKS)
_KEEP, _ITERATIONS = 0.25, 6


class Gpu(NamedTuple):
    """Peak rates of a GPU by its data sheet, dense: 10^12 operations a second, and GB/s."""

    half: float  # float16 and bfloat16
    tf32: float
    float32: float
    bandwidth: float


GPUS = {
    "A100": Gpu(312, 156, 19.5, 2039),  # SXM, 80 GB
    "H100": Gpu(989, 494, 66.9, 3350),  # SXM
    "H200": Gpu(989, 494, 66.9, 4800),  # SXM
    "RTX 4090": Gpu(165, 82.6, 82.6, 1008),
}


@dataclass(frozen=True)
class Floor:
    """The least time that a GPU needs: what must be computed, or what must be moved."""

    gpu: str
    forward_ms: float
    both_ms: float  # forward and backward
    bound_by: str  # "operations" or "bytes", of both


@dataclass(frozen=True)
class Explanation:
    """What ``explain`` found. ``print`` shows it; ``dataclasses.asdict`` is for programs.

    q, k: the shapes. runs: the implementation that runs. reasons: why each of the others does not.
    density: share of all pairs that are attended to. pairs: how many; both None for an op that
    attends to everything in another way. landmarks: m of such an op, or None. work: operations and
    bytes of any implementation; choosing blocks or tokens is not counted. break_even: where it is
    as fast as dense attention on this device, or None where that was not measured. slower: why
    dense attention would be faster for this shape, or None; then the method "topk" of the layers
    attends densely.
    """

    op: str
    q: tuple[int, ...]
    k: tuple[int, ...]
    dtype: str
    device: str
    runs: str
    reasons: dict[str, list[str]]
    density: float | None
    pairs: float | None
    landmarks: int | None
    work: Work
    floor: Floor | None
    break_even: break_even.BreakEven | None
    slower: str | None

    def as_dict(self) -> dict[str, Any]:
        """Return everything as plain values, for JSON."""
        found = asdict(self)
        measured = self.break_even
        return found | {"break_even": None if measured is None else measured._asdict()}

    def __str__(self) -> str:
        """Format it for people."""
        return "\n".join(_lines(self))


def explain(
    op: str,
    q_shape: Sequence[int],
    k_shape: Sequence[int] | None = None,
    *,
    keep: int | float | BlockMask | None = None,
    block_size: int | tuple[int, int] = 64,
    landmarks: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    impl: Impl = "auto",
    gpu: str | None = None,
) -> Explanation:
    """Say which implementation an attention op would run for a shape, and what that must cost.

        print(explain("topk_attention", (1, 6, 4096, 64), keep=0.25, gpu="H100"))

    Nothing of that size is allocated and nothing is computed.

    Args:
        op: "block_sparse_attention", "topk_attention", "saliency_attention", or one that is linear
            in the tokens: "performer_attention", "nystrom_attention", "linformer_attention",
            "linear_attention".
        q_shape: of the queries, [B, H, Nq, D].
        k_shape: of the keys and values, [B, G, Nk, D]; default q_shape.
        keep: as the op takes it, a count or a fraction: of the key blocks that every query block
            keeps, or of the tokens (saliency_attention). For block_sparse_attention also the mask.
            Default 0.25; the linear ops keep everything and take none.
        block_size: tokens in a query block and in a key block, where blocks are kept.
        landmarks: m: random features (performer_attention, default 256), means of segments
            (nystrom_attention, 64) or projected tokens (linformer_attention, 256).
        dtype: of q, k and v.
        device: where they would lie; default a GPU if there is one.
        impl: as the op takes it.
        gpu: also give the floor of that GPU, which need not be here: "A100", "H100", "H200" or
            "RTX 4090". Default: the GPU of `device`, if it is one of these.

    Returns:
        What was found, of which ``str`` is a table.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an unknown op or GPU, a wrong shape, or a device that is not here.
        NotImplementedError: impl="triton" cannot run this; the message lists every reason.

    Notes:
        FLOPs and bytes are what the math needs, however it is computed: 2 products of 2 * D
        operations a pair forward and 5 backward, every input read and every output written once. A
        ragged last block counts as a whole one, unless a mask is given. The linear ops are counted
        in docs/math: nystrom_attention with 6 iterations, linformer_attention with projections
        shared by the heads and trained.
        The floor is the greater of operations at the peak rate and bytes at the bandwidth of the
        data sheet; no kernel reaches it. float32 counts as the faster of plain arithmetic and three
        TF32 products, or as TF32 where torch.backends.cuda.matmul.allow_tf32 is set.
    """
    if op not in OPS:
        raise ValueError(f"{_OP}: op is {op!r}; expected one of {', '.join(OPS)}")
    q, k = _check_shapes(q_shape, q_shape if k_shape is None else k_shape)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(f"{_OP}: dtype {checks.describe(dtype)}; expected a floating point dtype")
    place = _check_device(device)
    density = pairs = slower = None
    count = _check_landmarks(op, landmarks)
    if op in _KEEPING:
        kept, parts, pairs = _kept(op, q, k, _KEEP if keep is None else keep, block_size)
        everything = q[0] * q[1] * q[2] * k[2]
        density = pairs / everything if everything else 0.0
        work = attention_work(q, k, pairs, dtype.itemsize)
        slower = break_even.dense_reason(op, kept, parts, k[2], place)
    else:
        work = _linear_work(op, q, k, keep, count, dtype.itemsize)
    runs, reasons = _choose(op, q, dtype, place, impl)
    return Explanation(
        op=op,
        q=q,
        k=k,
        dtype=str(dtype).removeprefix("torch."),
        device=str(place),
        runs=runs,
        reasons=reasons,
        density=density,
        pairs=pairs,
        landmarks=count,
        work=work,
        floor=_floor(work, dtype, gpu, place),
        break_even=break_even.measured(op, place),
        slower=slower,
    )


def _check_shapes(q_shape: Any, k_shape: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return both shapes as tuples, held against each other."""
    found = []
    for name, shape in (("q_shape", q_shape), ("k_shape", k_shape)):
        if not isinstance(shape, (tuple, list)) or len(shape) != 4:
            raise ValueError(f"{_OP}: {name} {checks.describe(shape)}; expected 4 sizes")
        for size in shape:
            checks.require_int(_OP, name, size, low=0)
        found.append(tuple(shape))
    q, k = found
    if q[0] != k[0] or q[3] != k[3] or not k[1] or q[1] % k[1] or not q[3]:
        raise ValueError(
            f"{_OP}: k_shape is {list(k)}; expected [B, G, Nk, D], B={q[0]}, D={q[3]}, "
            f"G a divisor of H={q[1]} (from q_shape)"
        )
    return q, k


def _check_device(device: Any) -> torch.device:
    """Return the device, if it is here."""
    here = torch.cuda.is_available()
    place = torch.device(("cuda" if here else "cpu") if device is None else device)
    if place.type == "cuda" and not here:
        raise ValueError(f"{_OP}: device is {place}; expected cpu, since torch sees no GPU")
    return place


def _kept(
    op: str, q: tuple[int, ...], k: tuple[int, ...], keep: Any, block_size: Any
) -> tuple[int, int, float]:
    """Return how many of how many parts of the keys a query sees, and how many pairs that is."""
    everything = q[0] * q[1] * q[2] * k[2]
    if isinstance(keep, BlockMask):
        if op != "block_sparse_attention":
            raise TypeError(f"{_OP}: keep is a BlockMask; expected an int or a float for {op}")
        if (keep.q_len, keep.k_len) != (q[2], k[2]):
            raise ValueError(
                f"{_OP}: keep has q_len={keep.q_len}, k_len={keep.k_len}; expected q_len={q[2]}, "
                f"k_len={k[2]} (from q_shape and k_shape)"
            )
        density = float(keep.density())
        return round(density * k[2]), k[2], density * everything
    if op == "saliency_attention":
        kept, parts = keep_capacity(checks.keep_share(_OP, keep), k[2]), k[2]
    else:
        parts = -(-k[2] // check_geometry(q[2], k[2], block_size, _OP)[1])
        kept = keep_count(keep, parts, _OP)
    return kept, parts, everything * kept / parts if parts else 0.0


def _check_landmarks(op: str, landmarks: Any) -> int | None:
    """Return m of an op that has landmarks."""
    if landmarks is None:
        return _LANDMARKS.get(op)
    if op not in _LANDMARKS:
        raise TypeError(f"{_OP}: landmarks {checks.describe(landmarks)}; expected None for {op}")
    checks.require_int(_OP, "landmarks", landmarks, low=1)
    return int(landmarks)


def _linear_work(
    op: str, q: tuple[int, ...], k: tuple[int, ...], keep: Any, count: int | None, item_bytes: int
) -> Work:
    """Return the work of an op that attends to everything, in time linear in the tokens."""
    if keep is not None:
        raise TypeError(f"{_OP}: keep {checks.describe(keep)}; expected None for {op}")
    if count is None:
        return linear_work(q, k, item_bytes)
    if op == "performer_attention":
        return performer_work(q, k, count, item_bytes)
    if op == "linformer_attention":
        return linformer_work(q, k, count, item_bytes)
    if q[2] != k[2]:
        raise ValueError(
            f"{_OP}: k_shape is {list(k)}; expected the tokens of q for {op}, N={q[2]} "
            "(from q_shape)"
        )
    return nystrom_work(q, k, count, _ITERATIONS, item_bytes)


def _choose(
    op: str, q: tuple[int, ...], dtype: torch.dtype, device: torch.device, impl: Any
) -> tuple[str, dict[str, list[str]]]:
    """Return what runs, and why each of the others does not."""
    unsupported = importlib.import_module(f"sparseattn.ops.{op}").unsupported
    # one element, in a tensor of the whole shape
    triton = unsupported(torch.empty((), dtype=dtype, device=device).expand(q))
    runs = dispatch.choose(op, impl, device, triton)
    if impl != "auto":
        others = [f"impl={impl!r} was asked for"]
        reasons = {"triton": [*triton, *others], "torch": others, "reference": others}
    else:
        slow = ["runs only if asked for: it is naive"]
        can = ["could run here, but auto takes torch off the GPU: this is the interpreter"]
        reasons = {"triton": triton or can, "torch": ["triton can run this"], "reference": slow}
    return runs, {name: why for name, why in reasons.items() if name != runs}


def _floor(work: Work, dtype: torch.dtype, gpu: Any, device: torch.device) -> Floor | None:
    if gpu is None:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
        gpu = next((known for known in GPUS if known in name), None)
        if gpu is None:
            return None
    if gpu not in GPUS:
        raise ValueError(f"{_OP}: gpu is {gpu!r}; expected one of {', '.join(GPUS)}")
    if dtype == torch.float64:  # no kernel of ours runs it there
        return None
    chip = GPUS[gpu]
    tf32 = chip.tf32 if torch.backends.cuda.matmul.allow_tf32 else chip.tf32 / 3
    rate = 1e12 * (chip.half if dtype.itemsize == 2 else max(chip.float32, tf32))
    times, bound = {}, ""
    for mode in ("forward", "both"):
        flops, _, moved = work.of(mode)
        times[mode] = 1e3 * floor_seconds(flops, moved, rate, 1e9 * chip.bandwidth)
        bound = "operations" if flops / rate > moved / (1e9 * chip.bandwidth) else "bytes"
    return Floor(gpu, times["forward"], times["both"], bound)


def _lines(found: Explanation) -> Iterator[str]:
    shapes = f"q {list(found.q)}" + (f", k and v {list(found.k)}" if found.k != found.q else "")
    yield f"{found.op}: {shapes}, {found.dtype} on {found.device}"
    yield f"  runs          {found.runs}"
    for name, reasons in found.reasons.items():
        for reason in reasons:
            yield f"  not {name:10}{reason}"
    if found.density is not None:
        yield f"  density       {found.density:.1%} of the pairs, {found.pairs:.3g} of them"
    if found.landmarks is not None:
        yield f"  landmarks     {found.landmarks}, for {found.k[2]} keys"
    for mode in ("forward", "both"):
        flops, dense, moved = found.work.of(mode)
        name = "forward" if mode == "forward" else "fwd + bwd"
        yield (
            f"  {name:14}{flops / 1e9:.3g} of dense attention's {dense / 1e9:.3g} GFLOP, "
            f"{moved / 1e6:.3g} MB of inputs and outputs"
        )
    if found.floor is not None:
        floor = found.floor
        yield (
            f"  floor         {floor.forward_ms:.3g} ms forward, {floor.both_ms:.3g} fwd + bwd on "
            f"{floor.gpu}, bound by {floor.bound_by}"
        )
    measured = found.break_even
    if measured is None:
        yield f"  break-even    unmeasured on {found.device}"
        return
    shares = ", ".join(f"{share:.0%} from {keys}" for keys, share in measured.shares)
    yield f"  break-even    keeping {shares} keys on ({measured.source})"
    yield f"  here          {found.slower or 'sparse attention is faster'}"
