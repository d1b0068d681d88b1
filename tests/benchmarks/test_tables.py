"""The README's tables: losses are bold, the strongest peer is named, what is missing is said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sparseattn.benchmarks import results, tables

MACHINE = {"device": "cpu", "name": "a processor", "threads": 2, "torch": "2.13.0", "commit": "abc"}
OP = "block_sparse_attention"


def records() -> list[dict[str, Any]]:
    """Dense takes 10 ms, ours 20 ms times the density, a variant 1, peers 4 and 40 ms."""
    found = []
    for density in (1.0, 0.25):
        times = {"ours": 20 * density, "ours-else": 1.0, "dense": 10.0, "strong": 4.0, "weak": 40.0}
        for provider, ms in times.items():
            for mode in ("forward", "both", "full") if provider == "ours" else ("forward", "both"):
                found.append(
                    {
                        "op": OP, "case": {"heads": 6, "tokens": 1024, "density": density},
                        "dtype": "float32", "density": density, "provider": provider,
                        "ours": provider.startswith("ours"), "dense": provider == "dense",
                        "mode": mode, "p20": ms, "p50": ms, "p80": ms, "runs": 3, "error": 0.5,
                        "peak_bytes": 1e6 * ms, "speedup": 10 / ms,
                    }
                )  # fmt: skip
    return found


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout with the results of one machine."""
    place = tmp_path / "benchmarks" / "results" / "machine"
    results.Writer(place / f"{OP}.json", False, MACHINE, []).write(records())
    (place / "proof.json").write_text(json.dumps({"runs": []}))
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    monkeypatch.setattr(tables, "RESULTS", place.parent)
    return place


def test_readme_part(folder: Path) -> None:
    text = tables.speed()
    assert "on a processor, 2 threads, torch 2.13.0, commit abc" in text
    assert "| density | float32 |\n|---|---|\n| 0.25 | 2 / 2 |\n| 1 | **0.5** / **0.5** |" in text
    assert "breaks even: 0.50 (float32)" in text
    assert "Peak extra memory of forward plus backward is 0.5 to 2 of that" in text
    assert (
        "against `strong`" in text
        and "| 0.25 | **0.8** / **0.8** |\n| 1 | **0.2** / **0.2** |" in text
    )
    assert "weak" not in text
    assert "Nothing has been measured on a GPU yet." in text
    readme = f"before\n{tables.BEGIN}\nold\n{tables.END}\nafter\n"
    made = tables.with_speed(readme)
    assert made == f"before\n{tables.BEGIN}\n{text}\n{tables.END}\nafter\n"
    assert tables.with_speed(made) == made


def test_page_has_every_provider_and_plot(folder: Path) -> None:
    (folder / f"{OP}_float32_density.png").touch()
    page = tables.page(folder)
    assert page.count("### float32, heads 6, tokens 1024, density ") == 2
    assert all(page.count(f"| {name} |") == 2 for name in ("ours", "dense", "strong", "weak"))
    assert f"]({OP}_float32_density.png)" in page


def test_what_was_not_measured_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables.registry, "ops", lambda: [OP, "another"])
    assert "No committed result yet: `another`." in tables.speed()


def test_a_readme_without_marks_is_refused() -> None:
    with pytest.raises(ValueError, match="lacks the marks"):
        tables.with_speed("no marks")
