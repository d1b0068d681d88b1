"""Block-sparse attention against dense attention: time, memory, and where it loses.

    python benchmarks/bench_block_sparse_attention.py --lengths 4096 8192 --dtypes float32 bfloat16

One process; the dense and the sparse call take turns; medians after warm-up, with the 20th and 80th
percentile. The mask keeps random key blocks, as many in every row, other ones for each head. "mask"
is the time to build it from block scores; it is not in the other columns. A row whose result is not
as near to float64 as dense attention's is not timed. The floor is the time of the same pairs at
dense attention's own rate: density times its time.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from sparseattn import BlockMask, __version__, block_sparse_attention
from sparseattn.testing.memory import peak_extra_bytes

DENSITIES = (0.05, 0.1, 0.15, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class Row:
    """One shape and density. Times in ms, [p20, median, p80]; memory in bytes."""

    dtype: str
    tokens: int
    heads: int
    head_dim: int
    block: int
    density: float
    mask_ms: float
    dense_forward: list[float]
    sparse_forward: list[float]
    dense_both: list[float]
    sparse_both: list[float]
    dense_bytes: int
    sparse_bytes: int

    @property
    def forward_gain(self) -> float:
        """How many times faster the forward is than dense."""
        return self.dense_forward[1] / self.sparse_forward[1]

    @property
    def both_gain(self) -> float:
        """How many times faster forward and backward are than dense."""
        return self.dense_both[1] / self.sparse_both[1]


def measure(dtype: torch.dtype, tokens: int, density: float, args: argparse.Namespace) -> Row:
    """Time one row."""
    generator = torch.Generator().manual_seed(args.seed)
    shape = (args.batch, args.heads, tokens, args.head_dim)
    q, k, v, dout = (
        torch.randn(shape, generator=generator).to(args.device, dtype) for _ in range(4)
    )
    leaves = tuple(x.requires_grad_() for x in (q, k, v))
    blocks = -(-tokens // args.block)
    scores = torch.rand((1, args.heads, blocks, blocks), generator=generator).to(args.device)

    def build() -> BlockMask:
        keep = max(1, round(density * blocks))
        return BlockMask.from_block_scores(scores, keep, tokens, tokens, args.block)

    mask = build()

    def dense() -> Tensor:
        return scaled_dot_product_attention(q, k, v)

    def sparse() -> Tensor:
        return block_sparse_attention(q, k, v, mask)

    require_close(q, k, v, mask)
    calls = {
        "mask": build,
        "dense_forward": lambda: _no_grad(dense),
        "sparse_forward": lambda: _no_grad(sparse),
        "dense_both": lambda: torch.autograd.grad(dense(), leaves, dout),
        "sparse_both": lambda: torch.autograd.grad(sparse(), leaves, dout),
    }
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(args.warmup + args.rounds):
        for name, call in calls.items():
            taken = milliseconds(call, args.device)
            if turn >= args.warmup:
                times[name].append(taken)
    spans = {name: percentiles(taken) for name, taken in times.items()}
    mask_ms = spans.pop("mask")[1]
    memory = [peak_extra_bytes(calls[name])[1] for name in ("dense_both", "sparse_both")]
    return Row(
        str(dtype).removeprefix("torch."), tokens, args.heads, args.head_dim, args.block,
        float(mask.density()), mask_ms, *spans.values(), *memory,
    )  # fmt: skip


def require_close(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> None:
    """Check the last query blocks against float64; SystemExit if the op is wrong."""
    with torch.no_grad():
        first = max(0, (mask.num_q_blocks - 2) * mask.block_size[0])
        got = block_sparse_attention(q, k, v, mask)[:, :, first:].double()
        shown = (mask.block_states() == -2)[:, :, -2:]
        shown = shown.repeat_interleave(mask.block_size[0], 2)[:, :, : q.shape[2] - first]
        shown = shown.repeat_interleave(mask.block_size[1], 3)[..., : k.shape[2]]
        exact, naive = (
            scaled_dot_product_attention(q[:, :, first:].to(t), k.to(t), v.to(t), attn_mask=shown)
            for t in (torch.float64, q.dtype)
        )
        error, allowed = (got - exact).abs().max(), (naive.double() - exact).abs().max()
        if not error <= 2 * allowed + torch.finfo(q.dtype).eps:
            raise SystemExit(f"wrong result: error {error:.3g}, dense attention's {allowed:.3g}")


def milliseconds(call: Callable[[], object], device: str) -> float:
    """Time one call, waiting for the device at both ends."""
    if device == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - started)


def percentiles(times: list[float]) -> list[float]:
    """Return the 20th, 50th and 80th percentile."""
    if len(times) < 2:
        return times * 3
    cuts = statistics.quantiles(times, n=10, method="inclusive")
    return [cuts[1], statistics.median(times), cuts[7]]


def _no_grad(call: Callable[[], Tensor]) -> Tensor:
    with torch.no_grad():
        return call()


def line(row: Row) -> str:
    """Format a row; LOSES marks one that dense attention wins."""
    gains = (("forward", row.forward_gain), ("both", row.both_gain))
    lost = [name for name, gain in gains if gain < 1]
    floor = row.density * row.dense_forward[1]
    return (
        f"{row.dtype:9} {row.tokens:6} {row.density:7.3f} {row.mask_ms:7.2f} "
        f"{row.dense_forward[1]:9.1f} {row.sparse_forward[1]:9.1f} {floor:8.1f} "
        f"{row.forward_gain:6.2f}x {row.dense_both[1]:9.1f} {row.sparse_both[1]:9.1f} "
        f"{row.both_gain:6.2f}x {row.sparse_bytes / row.dense_bytes:6.2f} "
        f"{'LOSES ' + ', '.join(lost) if lost else ''}"
    )


def break_even(rows: list[Row], gain: str) -> str:
    """Return the highest density that was measured to win."""
    winning = [row.density for row in rows if getattr(row, gain) >= 1]
    return f"{max(winning):.2f}" if winning else "none"


def main(argv: list[str] | None = None) -> int:
    """Run the table and write it as JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 8192])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--densities", type=float, nargs="+", default=DENSITIES)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--block", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="also write the rows here")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    name = torch.cuda.get_device_name() if args.device == "cuda" else platform.processor()
    about = {
        "device": f"{args.device} {name}".strip(),
        "threads": args.threads,
        "torch": torch.__version__,
        "sparseattn": __version__,
        "arguments": {key: str(value) for key, value in vars(args).items()},
    }
    print(f"{about['device']}, {args.threads} threads, torch {torch.__version__}")
    print(
        "dtype     tokens density mask ms   forward ms: dense, sparse, floor, gain"
        "   forward+backward ms: dense, sparse, gain   memory ratio"
    )
    rows: list[Row] = []
    for dtype in args.dtypes:
        for tokens in args.lengths:
            group = []
            for density in args.densities:
                group.append(measure(getattr(torch, dtype), tokens, density, args))
                print(line(group[-1]), flush=True)
            print(
                f"          {tokens:6} wins up to density {break_even(group, 'forward_gain')} "
                f"forward, {break_even(group, 'both_gain')} forward and backward"
            )
            rows += group
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        report = {**about, "rows": [asdict(row) for row in rows]}
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
