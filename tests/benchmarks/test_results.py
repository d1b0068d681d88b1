"""Records after the measurement: files, tables, break-even, plots."""

from __future__ import annotations

from pathlib import Path

import pytest

from sparseattn.benchmarks import plots, results, table
from sparseattn.benchmarks.runner import Record

MACHINE = {
    "device": "cpu", "name": "a processor", "threads": 2, "torch": "2.13.0", "commit": "abc",
    "matmul_tflops": {"float32": 0.1}, "copy_gbps": 10.0,
}  # fmt: skip


def record(provider: str, mode: str, ms: float, **axes: float) -> Record:
    return {
        "op": "toy", "case": {"heads": 6, **axes}, "dtype": "float32",
        "density": axes.get("density", 1.0), "provider": provider, "ours": provider == "ours",
        "dense": provider == "dense", "mode": mode, "p20": 0.9 * ms, "p50": ms, "p80": 1.1 * ms,
        "runs": 7, "error": 0.5, "peak_bytes": 1e6, "useful_tflops": 0.1, "dense_tflops": 0.2,
        "gbps": 5.0, "floor_ms": 0.5, "floor_ratio": 2 * ms, "speedup": 10 / ms,
    }  # fmt: skip


def note(provider: str, text: str, **axes: float) -> Record:
    own = {k: v for k, v in record(provider, "", 1, **axes).items() if k not in ("mode", "speedup")}
    return {**own, "note": text, "wrong": False}


def sweep() -> list[Record]:
    """Dense takes 10 ms; ours 20 ms times the density, so it breaks even at a half."""
    found = []
    for tokens in (1024, 2048):
        for density in (0.1, 0.25, 1.0):
            at = {"tokens": tokens, "density": density}
            for mode in ("forward", "both", "full"):
                found.append(record("ours", mode, 20 * density, **at))
            found += [record("dense", mode, 10.0, **at) for mode in ("forward", "both")]
            found += [record("peer", "forward", 15.0, **at), note("other", "not here", **at)]
    return found


def test_files_keep_runs_apart_and_the_latest_figures_count(tmp_path: Path) -> None:
    path = tmp_path / "new" / "toy.json"
    first = results.Writer(path, False, MACHINE, ["one"])
    first.write([record("ours", "forward", 1.23456789, tokens=1024), note("peer", "not installed")])
    second = results.Writer(path, True, MACHINE | {"commit": "def"}, ["two"])
    second.write([record("ours", "forward", 2.0, tokens=1024), record("peer", "forward", 3.0)])
    runs = results.load_runs(path)
    assert [run["command"] for run in runs] == [["one"], ["two"]]
    assert runs[0]["records"][0]["p50"] == 1.235
    found = {(r["provider"], r.get("mode")): r for r in results.read([path])}
    assert set(found) == {("ours", "forward"), ("peer", "forward")}
    assert found["ours", "forward"]["p50"] == 2.0
    assert found["ours", "forward"]["machine"]["commit"] == "def"
    results.Writer(path, False, MACHINE, ["three"]).write([])
    assert len(results.load_runs(path)) == 1


def test_another_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text('{"rows": []}')
    with pytest.raises(ValueError, match="is not a result file"):
        results.load_runs(path)


def test_table_shows_losses_and_why_others_are_missing() -> None:
    case = [r for r in sweep() if r["case"]["tokens"] == 1024 and r["density"] == 1.0]
    text = table.case_table(case)
    title, head, *lines = text.splitlines()
    assert title == "toy float32 heads=6 tokens=1024 density=1 (density 1.000)"
    assert len({len(line) for line in (head, *lines[:-1])}) == 1
    ours = next(line for line in lines if line.split()[0] == "ours")
    assert "20.0 (18.0-22.0)" in ours and "0.500x!" in ours
    assert lines[-1] == "  other: not here"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "-"),
        (0, "0"),
        (1234.5, "1230"),
        (99.96, "100"),
        (9.996, "10.0"),
        (0.01234, "0.0123"),
        (0.00077, "7.7e-04"),
    ],
)
def test_numbers_have_three_digits(value: float | None, text: str) -> None:
    assert table.number(value) == text


@pytest.mark.parametrize(
    ("points", "text"),
    [
        ([(0.1, 5.0), (0.25, 2.0), (1.0, 0.5)], "0.50"),
        ([(0.1, 0.9), (0.5, 0.5)], "below 0.1"),
        ([(0.1, 4.0), (1.0, 1.1)], "above 1"),
        ([(0.5, 0.9), (0.25, 1.1), (1.0, 1.2)], "0.35"),  # the first loss counts
        ([], "not measured"),
    ],
)
def test_break_even(points: list[tuple[float, float]], text: str) -> None:
    assert table.break_even({"density": d, "speedup": s} for d, s in points) == text


def test_break_even_is_said_for_every_sweep_of_ours() -> None:
    lines = table.break_even_lines(sweep())
    assert len(lines) == 6 and all(line.endswith("break-even density 0.50") for line in lines)


def test_means_are_geometric_and_name_what_loses() -> None:
    records = sweep()
    for density, ms in ((0.1, 1.0), (1.0, 40.0)):
        at = {"tokens": 1024, "density": density}
        records.append(record("peer", "both", ms, **at) | {"peak_bytes": 4e6})
    lines = table.mean_lines(records)
    dense = [line for line in lines if table.DENSE in line]
    assert len(lines) == 5 and [line.split(":")[0] for line in dense] == [
        f"toy float32 heads=6 {mode}" for mode in ("forward", "both", "full")
    ]  # the dense one has no "full": its "both" is that
    # of 10 / (20 * density): 5, 2 and 0.5, twice
    assert all("1.71x the best dense one, geometric mean of 6 cases, 0.500x to 5.00x" in line
               and "peak memory 1.00 to 1.00 of its" in line
               and "loses tokens=1024 density=1 (0.500x), tokens=2048 density=1 (0.500x)" in line
               for line in dense)  # fmt: skip
    (peer,) = (line for line in lines if "both: " in line and table.DENSE not in line)
    assert "both: 1.00x peer, geometric mean of 2 cases, 0.500x to 2.00x" in peer
    assert "peak memory 0.250 to 0.250 of its; loses tokens=1024 density=0.1 (0.500x)" in peer


def test_plots_show_what_was_measured(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason='needs pip install "sparseattn[bench]"')
    records = [r | {"machine": MACHINE} for r in sweep()]
    paths = plots.draw(records, tmp_path / "plots")
    kinds = ("density", "latency", "memory")
    assert [path.name for path in paths] == [f"toy_float32_{kind}.png" for kind in kinds]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)
    wide = [r | {"case": {**r["case"], "block": b}} for r in records for b in (64, 128)]
    assert len(plots.draw(wide, tmp_path / "wide")) == 6
    assert plots.draw(records[:1], tmp_path / "one") == []


def test_plot_lines_hold_the_medians() -> None:
    pytest.importorskip("matplotlib", reason='needs pip install "sparseattn[bench]"')
    (lines,) = plots._figures(sweep(), "density", "density").values()
    figure = plots._density(lines)
    drawn = {line.get_label(): line for line in figure.axes[0].lines}
    assert list(drawn["ours 1024 tokens"].get_ydata()) == [5.0, 2.0, 0.5]
    assert list(drawn["ours 1024 tokens"].get_xdata()) == [0.1, 0.25, 1.0]
    (lines,) = plots._figures(sweep(), "tokens", "latency").values()
    drawn = {line.get_label(): line for line in plots._latency(lines).axes[0].lines}
    assert list(drawn["ours"].get_ydata()) == [2.0, 2.0]  # at density 0.1, the nearest to 0.15
    assert list(drawn["dense"].get_ydata()) == [10.0, 10.0]
