"""Tables of a comparison, dense against sparse, as text and as one self-contained HTML page."""

import base64
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby
from string import Template

MEGABYTE = 1e6


@dataclass(frozen=True)
class Row:
    """One job run with dense and with sparse attention.

    Times are medians of `runs`, in ms; `step` is forward and backward. Bytes are the most held at
    once during a step, beyond what was held before it. Errors are relative to dense, Euclidean;
    differences are the largest absolute ones. `kept` is the share of the mask that is visible.
    """

    job: str
    tokens: int
    runs: int
    dense_forward_ms: float
    sparse_forward_ms: float
    dense_step_ms: float
    sparse_step_ms: float
    dense_bytes: int
    sparse_bytes: int
    output_error: float
    gradient_error: float
    output_difference: float
    gradient_difference: float
    kept: float = 1.0

    @property
    def forward_ratio(self) -> float:
        """How many times faster sparse is, forward."""
        return self.dense_forward_ms / self.sparse_forward_ms

    @property
    def step_ratio(self) -> float:
        """How many times faster sparse is, forward and backward."""
        return self.dense_step_ms / self.sparse_step_ms


@dataclass(frozen=True)
class Selection:
    """One way to choose tiles: the share kept, the dense attention mass inside, the error."""

    name: str
    kept: float
    mass: float
    error: float


@dataclass(frozen=True)
class Picture:
    """A PNG with its title, its caption and its text for those who cannot see it."""

    title: str
    caption: str
    alt: str
    png: bytes


@dataclass(frozen=True)
class Table:
    """Cells as text. A column's head is a group (shared by its neighbours) and a name."""

    head: list[tuple[str, str]]
    cells: list[list[str]]

    def groups(self) -> list[tuple[str, int]]:
        """Return each group with the number of columns it spans."""
        return [(group, len(list(run))) for group, run in groupby(g for g, _ in self.head)]


def difference(value: float) -> str:
    """Write a difference as text; none at all is "0"."""
    return f"{value:.1e}" if value else "0"


def rows_table(rows: Sequence[Row]) -> Table:
    """Return the comparison as a table."""
    columns: dict[tuple[str, str], Callable[[Row], str]] = {
        ("", "job"): lambda row: row.job,
        ("", "N"): lambda row: str(row.tokens),
        ("", "kept"): lambda row: f"{row.kept:.1%}",
        ("forward, ms", "dense"): lambda row: _ms(row.dense_forward_ms),
        ("forward, ms", "sparse"): lambda row: _ms(row.sparse_forward_ms),
        ("forward, ms", "gain"): lambda row: f"{row.forward_ratio:.2f}x",
        ("forward + backward, ms", "dense"): lambda row: _ms(row.dense_step_ms),
        ("forward + backward, ms", "sparse"): lambda row: _ms(row.sparse_step_ms),
        ("forward + backward, ms", "gain"): lambda row: f"{row.step_ratio:.2f}x",
        ("extra MB", "dense"): lambda row: f"{row.dense_bytes / MEGABYTE:.0f}",
        ("extra MB", "sparse"): lambda row: f"{row.sparse_bytes / MEGABYTE:.0f}",
        ("error of", "output"): lambda row: _error(row.output_error),
        ("error of", "gradient"): lambda row: _error(row.gradient_error),
    }
    return Table(list(columns), [[cell(row) for cell in columns.values()] for row in rows])


def selections_table(selections: Sequence[Selection]) -> Table:
    """Return the ways to choose tiles as a table."""
    head = ["tiles chosen by", "kept", "attention mass kept", "error of output"]
    cells = [[s.name, f"{s.kept:.1%}", f"{s.mass:.1%}", _error(s.error)] for s in selections]
    return Table([("", name) for name in head], cells)


def text_table(table: Table) -> str:
    """Lay a table out for a terminal: first column to the left, the others to the right."""
    lines = [[name for _, name in table.head], *table.cells]
    widths = [max(len(line[i]) for line in lines) for i in range(len(table.head))]
    first = 0
    spans = []
    for group, count in table.groups():
        span = sum(widths[first : first + count]) + 2 * (count - 1)
        if len(group) > span:
            widths[first] += len(group) - span
            span = len(group)
        spans.append(group.center(span, "-") if group else " " * span)
        first += count
    laid = [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    ]
    above = ["  ".join(spans)] if any(group for group, _ in table.groups()) else []
    return "\n".join([*above, laid[0], "-" * len(laid[0]), *laid[1:]])


def html_page(
    *,
    title: str,
    lead: str,
    cards: Sequence[tuple[str, str]],
    rows: Sequence[Row],
    table_notes: Sequence[str],
    pictures: Sequence[Picture],
    selections: Sequence[Selection],
    selection_note: str,
    notes: Sequence[str],
    facts: Sequence[tuple[str, str]],
) -> str:
    """Return the page: no script, no other file, no network. All text is escaped here."""
    return Template(_PAGE).substitute(
        title=escape(title),
        style=STYLE,
        lead=escape(lead),
        cards="\n".join(
            f'<div class="card"><b>{escape(value)}</b><span>{escape(text)}</span></div>'
            for value, text in cards
        ),
        comparison=html_table(rows_table(rows)),
        table_notes=html_list(table_notes),
        pictures="\n".join(html_picture(picture) for picture in pictures),
        selections=html_table(selections_table(selections)),
        selection_note=escape(selection_note),
        notes=html_list(notes),
        facts="\n".join(
            f'<tr><th scope="row">{escape(name)}</th><td>{escape(value)}</td></tr>'
            for name, value in facts
        ),
    )


def _ms(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 1 else f"{value:.3f}"


def _error(value: float) -> str:
    return f"{value:.3f}" if value >= 1e-3 else f"{value:.0e}" if value else "0"


def html_table(table: Table) -> str:
    """Return a table as HTML; its first column heads the rows."""
    groups = "".join(
        f'<th scope="colgroup" colspan="{count}">{escape(group)}</th>'
        for group, count in table.groups()
    )
    above = f'<tr class="groups">{groups}</tr>' if any(g for g, _ in table.groups()) else ""
    names = "".join(f'<th scope="col">{escape(name)}</th>' for _, name in table.head)
    body = "\n".join(
        "<tr>"
        + f'<th scope="row">{escape(line[0])}</th>'
        + "".join(f"<td>{escape(cell)}</td>" for cell in line[1:])
        + "</tr>"
        for line in table.cells
    )
    return (
        f'<div class="scroll"><table class="numbers"><thead>{above}<tr>{names}</tr></thead>'
        f"<tbody>\n{body}\n</tbody></table></div>"
    )


def html_list(lines: Sequence[str]) -> str:
    """Return lines as an HTML list."""
    return "<ul>\n" + "\n".join(f"<li>{escape(line)}</li>" for line in lines) + "\n</ul>"


def html_picture(picture: Picture) -> str:
    """Return a picture with its title and caption as HTML, the PNG inside."""
    data = base64.b64encode(picture.png).decode("ascii")
    return (
        f"<figure><h3>{escape(picture.title)}</h3>"
        f'<img alt="{escape(picture.alt)}" src="data:image/png;base64,{data}">'
        f"<figcaption>{escape(picture.caption)}</figcaption></figure>"
    )


STYLE = """
:root { color-scheme: light; --ink: #1d2733; --soft: #5b6878; --line: #d9dfe6; --accent: #b4480f; }
* { box-sizing: border-box; }
body { margin: 0; background: #f5f7f9; color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .6rem; }
h2 { font-size: 1.25rem; margin: 2.6rem 0 .8rem; border-top: 1px solid var(--line);
  padding-top: 1.4rem; }
h3 { font-size: 1rem; margin: 0 0 .6rem; }
p, li { max-width: 75ch; }
.lead { font-size: 1.08rem; color: var(--soft); }
.cards { display: grid; grid-template-columns: repeat(4, 1fr); gap: .9rem;
  margin: 1.4rem 0 0; }
.card, figure { background: #fff; border: 1px solid var(--line); border-radius: 10px; }
.card { padding: .9rem 1.1rem; }
.card b { display: block; font-size: 1.7rem; line-height: 1.25; color: var(--accent); }
.card span { color: var(--soft); font-size: .9rem; }
.scroll { overflow-x: auto; background: #fff; border: 1px solid var(--line); border-radius: 10px; }
table { border-collapse: collapse; }
.numbers { width: 100%; font-variant-numeric: tabular-nums; font-size: .9rem; }
.numbers th, .numbers td { padding: .5rem .65rem; text-align: right; vertical-align: bottom; }
.numbers th:first-child { text-align: left; font-weight: 600; min-width: 11rem; }
.numbers thead th { color: var(--soft); font-weight: 600; }
.numbers thead tr:last-child th { border-bottom: 2px solid var(--line); }
.numbers .groups th { text-align: center; padding-bottom: 0; }
.numbers tbody tr + tr > * { border-top: 1px solid var(--line); }
.pictures { display: grid; grid-template-columns: repeat(3, 1fr); gap: 1.1rem; }
figure { margin: 0; padding: 1rem; }
figure img { width: 100%; height: auto; display: block; }
figcaption { color: var(--soft); font-size: .9rem; margin-top: .6rem; }
.facts th { text-align: left; padding: .25rem 1.5rem .25rem 0; vertical-align: top;
  font-weight: 600; white-space: nowrap; }
.facts td { padding: .25rem 0; }
@media (max-width: 1000px) { .cards, .pictures { grid-template-columns: repeat(2, 1fr); } }
@media (max-width: 640px) { .cards, .pictures { grid-template-columns: 1fr; } }
.small li { color: var(--soft); font-size: .92rem; }
"""

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>$style</style>
</head>
<body>
<main>
<h1>$title</h1>
<p class="lead">$lead</p>
<div class="cards">
$cards
</div>
<h2>Dense against block-sparse</h2>
$comparison
<div class="small">$table_notes</div>
<h2>What was kept, and where it differs</h2>
<div class="pictures">
$pictures
</div>
<h2>Does the choice of tiles matter?</h2>
$selections
<p>$selection_note</p>
<h2>Read this before quoting a number</h2>
$notes
<h2>What was run</h2>
<table class="facts"><tbody>
$facts
</tbody></table>
</main>
</body>
</html>
"""
