"""Records as text: a table a case, where sparse stops to win, and how much it wins on average."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise

from sparseattn.benchmarks.runner import Record

HEAD = (
    "provider", "forward ms (p20-p80)", "backward ms", "both ms (p20-p80)", "index ms (of full)",
    "full ms", "gain fwd", "gain full", "TFLOP/s useful", "dense-eq.", "GB/s", "x floor",
    "peak MB", "scratch MB", "error",
)  # fmt: skip


def case_table(records: Sequence[Record]) -> str:
    """Return the table of one case: a line a provider, and why the others have none."""
    rows: list[tuple[str, ...]] = [HEAD]
    notes = []
    for name in dict.fromkeys(record["provider"] for record in records):
        modes = {r.get("mode"): r for r in records if r["provider"] == name}
        if None in modes:
            notes.append(f"  {name}: {modes[None]['note']}")
        else:
            rows.append((name, *cells(modes)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    ]
    return "\n".join([title(records[0]), *lines, *notes])


def title(record: Record) -> str:
    """Say what a record was measured on."""
    axes = " ".join(f"{axis}={value:g}" for axis, value in record["case"].items())
    return f"{record['op']} {record['dtype']} {axes} (density {record['density']:.3f})"


def cells(modes: dict[str | None, Record]) -> list[str]:
    """Return what stands under HEAD, but for the name; pairs are forward / forward + backward."""
    forward, backward, both = (modes.get(mode, {}) for mode in ("forward", "backward", "both"))
    full = modes.get("full", both)
    some = next(iter(modes.values()))
    return [
        _span(forward),
        number(backward.get("p50")),
        _span(both),
        _share(modes.get("index", {}), full),
        number(full.get("p50")),
        gain(forward),
        gain(full),
        *(_pair(forward, both, key) for key in ("useful_tflops", "dense_tflops", "gbps")),
        _pair(forward, both, "floor_ratio"),
        number(some["peak_bytes"] / 1e6),
        number(some["scratch_bytes"] / 1e6 if "scratch_bytes" in some else None),
        f"{some['error']:.2f}",
    ]


def number(value: float | None) -> str:
    """Three significant digits; "-" where nothing was measured."""
    if value is None:
        return "-"
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    value = float(f"{value:.3g}")
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:.{digits}f}" if digits < 5 else f"{value:.1e}"


def gain(record: Record) -> str:
    """Return "2.41x"; an exclamation mark where dense attention wins."""
    speedup = record.get("speedup")
    if speedup is None:
        return "-"
    return f"{number(speedup)}x" + ("!" if speedup < 1 else "")


def _span(record: Record) -> str:
    if not record:
        return "-"
    return f"{number(record['p50'])} ({number(record['p20'])}-{number(record['p80'])})"


def _share(index: Record, full: Record) -> str:
    """Return the time of the index, and what share of the full time that is."""
    if "p50" not in index or "p50" not in full:
        return number(index.get("p50"))
    return f"{number(index['p50'])} ({100 * index['p50'] / full['p50']:.0f}%)"


def _pair(forward: Record, both: Record, key: str) -> str:
    return f"{number(forward.get(key))} / {number(both.get(key))}"


AVERAGED = ("batch", "tokens", "size", "voxels", "density")  # axes whose values are averaged over
DENSE = "the best dense one"


def mean_lines(records: Sequence[Record]) -> list[str]:
    """Say for ours and each rival how much faster it is, over all cases but those of AVERAGED axes.

    The rivals are the fastest dense provider of each case, whose memory is the least of all dense
    ones, and every other peer. Losing cases are named.
    """
    found: dict[tuple, list[tuple[float, float, str]]] = {}
    for case in by_case(records):
        timed = [record for record in case if record.get("mode")]
        for mine in (record for record in timed if record["ours"]):
            for rival, ratio, memory in _rivals(mine, timed):
                axes = {a: v for a, v in mine["case"].items() if a not in AVERAGED}
                rest = (f"{a}={v:g}" for a, v in mine["case"].items() if a in AVERAGED)
                key = (mine["op"], mine["dtype"], tuple(axes.items()), mine["mode"], rival)
                found.setdefault(key, []).append((ratio, memory, " ".join(rest)))
    lines = []
    for (op, dtype, axes, mode, rival), cells in found.items():
        name = " ".join([op, dtype, *(f"{axis}={value:g}" for axis, value in axes), mode])
        ratios, shares = [cell[0] for cell in cells], [cell[1] for cell in cells]
        lost = [f"{where} ({number(ratio)}x)" for ratio, _, where in cells if ratio < 1]
        lines.append(
            f"{name}: {number(geometric_mean(ratios))}x {rival}, geometric mean of {len(cells)} "
            f"cases, {number(min(ratios))}x to {number(max(ratios))}x; peak memory "
            f"{number(min(shares))} to {number(max(shares))} of its; "
            f"loses {', '.join(lost) if lost else 'none'}"
        )
    return lines


def _rivals(mine: Record, records: Sequence[Record]) -> Iterator[tuple[str, float, float]]:
    """Yield each rival of one of our records: its name, its time over ours, our memory over its."""
    mode = mine["mode"]
    dense = [r for r in records if r["dense"] and r["mode"] == ("both" if mode == "full" else mode)]
    own = max(mine["peak_bytes"], 1.0)
    if dense:
        fastest = min(record["p50"] for record in dense)
        yield DENSE, fastest / mine["p50"], own / min(max(r["peak_bytes"], 1.0) for r in dense)
    for record in records:
        if not record["ours"] and not record["dense"] and record["mode"] == mode:
            yield (
                record["provider"],
                record["p50"] / mine["p50"],
                own / max(record["peak_bytes"], 1.0),
            )


def geometric_mean(ratios: Sequence[float]) -> float:
    """Return the mean of positive ratios."""
    return math.exp(sum(map(math.log, ratios)) / len(ratios))


def by_case(records: Iterable[Record]) -> list[list[Record]]:
    """Group records by op, dtype and case, in the order in which they come."""
    found: dict[tuple, list[Record]] = {}
    for record in records:
        key = (record["op"], record["dtype"], tuple(record["case"].items()))
        found.setdefault(key, []).append(record)
    return list(found.values())


def sweeps(records: Iterable[Record], axis: str) -> dict[tuple, list[Record]]:
    """Group the measured records by all but one axis, and sort each group along it.

    A key is (op, dtype, the other axes, provider, mode); a group of one point is no sweep.
    """
    found: dict[tuple, list[Record]] = {}
    for record in records:
        if record.get("mode") and axis in record["case"]:
            others = tuple((a, v) for a, v in record["case"].items() if a != axis)
            key = (record["op"], record["dtype"], others, record["provider"], record["mode"])
            found.setdefault(key, []).append(record)
    return {
        key: sorted(group, key=lambda record: float(record["case"][axis]))
        for key, group in found.items()
        if len({record["case"][axis] for record in group}) > 1
    }


def break_even(records: Iterable[Record]) -> str:
    """Return the density below which it wins, between measured ones on logarithmic scales."""
    points = sorted((r["density"], r["speedup"]) for r in records if "speedup" in r)
    if not points:
        return "not measured"
    if points[0][1] < 1:
        return f"below {points[0][0]:.2g}"
    for (low, above), (high, below) in pairwise(points):
        if below < 1:
            share = math.log(above) / (math.log(above) - math.log(below))
            return f"{low * (high / low) ** share:.2f}"
    return f"above {points[-1][0]:.2g}"


def break_even_lines(records: Iterable[Record]) -> list[str]:
    """Say for every sweep over density where our op stops to win."""
    lines = []
    found = sweeps((record for record in records if record["ours"]), "density")
    for (op, dtype, others, provider, mode), group in found.items():
        if mode in ("forward", "both", "full"):
            axes = " ".join(f"{axis}={value:g}" for axis, value in others)
            name = f"{op} {dtype} {axes} {provider} {mode}"
            lines.append(f"{name}: break-even density {break_even(group)}")
    return lines
