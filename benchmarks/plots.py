"""Plots of records: time and memory over length, and the gain over density with its break-even."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from sparseattn.benchmarks.runner import Record
from sparseattn.benchmarks.table import sweeps

PANELS = {"forward": "forward", "full": "forward and backward, index included"}
USUAL_DENSITY = 0.15
OURS_COLOUR, PEER_COLOURS = "#c02020", ("#1f4e9e", "#3a8f5c", "#8a5fb0", "#c98a1b", "#5b6770")
DASHES = ("--", ":", "-.")
LENGTH_COLOURS = ("#f2a65a", "#e0702b", "#b03a1e", "#6b1414", "#2b0505")
Lines = dict[str, list[Record]]


def draw(records: Sequence[Record], folder: Path) -> list[Path]:
    """Draw what the records hold; return the files that were written.

    One figure for each op, dtype and combination of the axes that are not swept.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for kind, axis, draw_one in (
        ("latency", "tokens", _latency),
        ("memory", "tokens", _memory),
        ("density", "density", _density),
    ):
        for name, lines in _figures(records, axis, kind).items():
            path = folder / f"{name}_{kind}.png"
            figure = draw_one(lines)
            figure.suptitle(_heading(lines), fontsize=10)
            _legend(figure)
            figure.savefig(path, dpi=110)
            paths.append(path)
    return sorted(paths)


def _figures(records: Sequence[Record], axis: str, kind: str) -> dict[str, Lines]:
    """Return figure name -> the lines in it, each a sweep over `axis`."""
    varied = _varied(records)
    found: dict[str, Lines] = {}
    for (op, dtype, others, provider, mode), group in sweeps(records, axis).items():
        rest = dict(others)
        label = provider
        if kind == "density":
            if group[0]["dense"]:
                continue
            label = f"{provider} {rest.pop('tokens', 0):g}"
        elif "density" in rest and rest.pop("density") != _usual(records, op):
            continue
        marks = [f"{a}{v:g}" for a, v in rest.items() if a in varied[op] - {"density", "tokens"}]
        name = "_".join([op, dtype, *marks])
        found.setdefault(name, {}).setdefault(f"{label}|{mode}", []).extend(group)
    return found


def _varied(records: Iterable[Record]) -> dict[str, set[str]]:
    """Return the axes of each op that have more than one value."""
    values: dict[str, dict[str, set[float]]] = {}
    for record in records:
        for axis, value in record["case"].items():
            values.setdefault(record["op"], {}).setdefault(axis, set()).add(value)
    return {op: {a for a, found in axes.items() if len(found) > 1} for op, axes in values.items()}


def _usual(records: Iterable[Record], op: str) -> float:
    """Return the density at which lengths are compared: the measured one nearest to 0.15."""
    found = {r["case"]["density"] for r in records if r["op"] == op and "density" in r["case"]}
    return float(min(found, key=lambda value: abs(value - USUAL_DENSITY)))


def _heading(lines: Lines) -> str:
    first = next(iter(lines.values()))[0]
    device = first.get("machine", {}).get("name", "")
    fixed = {a: v for a, v in first["case"].items() if a not in ("tokens", "density")}
    axes = ", ".join(f"{axis} {value:g}" for axis, value in fixed.items())
    return "\n".join(filter(None, [f"{first['op']}, {first['dtype']}, {axes}", device]))


def _latency(lines: Lines) -> Any:
    """Median time over length on logarithmic scales; a band from p20 to p80; the floor dotted."""
    figure, axes = _canvas(len(PANELS))
    colours = _colours(lines)
    for axis, (mode, heading) in zip(axes, PANELS.items(), strict=True):
        shown = _of_mode(lines, mode)
        for name, group in shown.items():
            x = [record["case"]["tokens"] for record in group]
            low, mid, high = ([r[bound] for r in group] for bound in ("p20", "p50", "p80"))
            axis.plot(x, mid, marker="o", ms=4, color=colours[name], label=name)
            axis.fill_between(x, low, high, color=colours[name], alpha=0.2, lw=0)
            if group[0]["ours"]:
                floor = [record["floor_ms"] for record in group]
                axis.plot(x, floor, ":", color=colours[name], label=f"{name}: floor")
        _logarithmic(axis, heading + _at_density(shown), "tokens", "ms", _places(shown, "tokens"))
    return figure


def _memory(lines: Lines) -> Any:
    """Peak extra memory over length on logarithmic scales."""
    figure, axes = _canvas(1)
    colours = _colours(lines)
    shown: Lines = {}
    for mode in ("forward", "both"):  # both where there is a backward
        shown |= _of_mode(lines, mode)
    for name, group in shown.items():
        x = [record["case"]["tokens"] for record in group]
        y = [record["peak_bytes"] / 1e6 for record in group]
        label = name if f"{name}|both" in lines else f"{name} (forward)"
        axes[0].plot(x, y, marker="o", ms=4, color=colours[name], label=label)
    heading = "peak extra memory, forward and backward" + _at_density(shown)
    _logarithmic(axes[0], heading, "tokens", "MB", _places(shown, "tokens"))
    return figure


def _density(lines: Lines) -> Any:
    """Gain over the fastest dense baseline, over density; below 1 dense attention wins."""
    figure, axes = _canvas(len(PANELS))
    lengths = _places(lines, "tokens")
    peers = [name for name, group in lines.items() if not group[0]["ours"]]
    styles = dict(zip(dict.fromkeys(name.split()[0] for name in peers), DASHES * 9, strict=False))
    for axis, (mode, heading) in zip(axes, PANELS.items(), strict=True):
        shown = _of_mode(lines, mode)
        for name, group in shown.items():
            place = lengths.index(group[0]["case"].get("tokens", 0))
            colour = LENGTH_COLOURS[place % len(LENGTH_COLOURS)]
            style = styles.get(name.split()[0], "-")
            points = [(r["density"], r["speedup"]) for r in group if "speedup" in r]
            if points:
                x, y = zip(*points, strict=True)
                axis.plot(x, y, ls=style, marker="o", ms=4, color=colour, label=f"{name} tokens")
        axis.axhline(1, color="black", lw=1)
        beside = axis.get_yaxis_transform()
        axis.text(0.98, 1.03, "dense", ha="right", va="bottom", transform=beside)
        ticks = _places(shown, "density")
        _logarithmic(axis, heading, "share of pairs kept", "times as fast as dense", ticks)
    return figure


def _of_mode(lines: Lines, mode: str) -> Lines:
    """Return name -> group for a mode; without an index, full is forward and backward."""
    shown = {}
    for label, group in lines.items():
        name, found = label.split("|")
        if found == mode or (mode == "full" and found == "both" and f"{name}|full" not in lines):
            shown[name] = group
    return shown


def _colours(lines: Lines) -> dict[str, str]:
    """Return a colour for every provider, the same in all panels of a figure."""
    ours = {label.split("|")[0]: group[0]["ours"] for label, group in lines.items()}
    peers = iter(PEER_COLOURS * len(ours))
    return {name: OURS_COLOUR if is_ours else next(peers) for name, is_ours in ours.items()}


def _places(lines: Lines, axis: str) -> list[float]:
    """Return the values of an axis that occur, in order."""
    return sorted({r["case"].get(axis, 0) for group in lines.values() for r in group})


def _at_density(shown: Lines) -> str:
    ours = [r["density"] for group in shown.values() if group[0]["ours"] for r in group]
    return f", {ours[-1]:.0%} of pairs kept" if ours and min(ours) < 1 else ""


def _canvas(panels: int) -> tuple[Any, list[Any]]:
    from matplotlib.figure import Figure  # no pyplot: nothing is left open, no display is needed

    figure = Figure(figsize=(5.4 * panels, 5.0), layout="constrained")
    axes = [figure.add_subplot(1, panels, place + 1) for place in range(panels)]
    return figure, axes


def _legend(figure: Any) -> None:
    """One legend below all panels."""
    known: dict[str, Any] = {}
    for axis in figure.axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            known.setdefault(label, handle)
    columns = 4 if len(figure.axes) > 1 else 2
    figure.legend(
        known.values(), known, loc="outside lower center", ncols=columns, fontsize=8, frameon=False
    )


def _logarithmic(axis: Any, heading: str, x: str, y: str, ticks: Sequence[float]) -> None:
    from matplotlib.ticker import FuncFormatter, LogFormatter, NullLocator

    axis.set(xscale="log", yscale="log", xlabel=x, ylabel=y)
    axis.set_title(heading, fontsize=9)
    axis.set_xticks(list(ticks), [f"{tick:g}" for tick in ticks])
    axis.xaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1, 0.4)))
    axis.grid(alpha=0.3, which="both", lw=0.5)
