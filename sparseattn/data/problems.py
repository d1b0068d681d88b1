"""Files and rows that cannot be used: named, counted, and skipped or raised as the user chooses."""

import csv
import gzip
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TextIO

OnError = Literal["raise", "skip"]


class DataError(ValueError):
    """A file, or a row of a table, that cannot be used; the message names it."""


@dataclass
class Problems:
    """What was wrong with a data set.

    on_error  "raise" ends at the first problem with a DataError; "skip" leaves the example out
    found     place, kind and description of every problem, in the order they were found
    """

    on_error: OnError = "raise"
    found: list[tuple[str, str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.on_error not in ("raise", "skip"):
            raise ValueError(f"data: on_error is {self.on_error!r}; expected raise or skip")

    def add(self, place: str | Path, kind: str, detail: str) -> None:
        """Note a problem, or raise it."""
        if self.on_error == "raise":
            raise DataError(f"{place}: {kind}: {detail}")
        self.found.append((str(place), kind, detail))

    def counts(self) -> dict[str, int]:
        """Return how often each kind of problem was found."""
        return dict(Counter(kind for _, kind, _ in self.found))

    def write(self, path: Path) -> None:
        """Write all of them as a CSV file."""
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["place", "kind", "detail"])
            writer.writerows(self.found)


def read_table(
    path: Path, columns: Sequence[str], problems: Problems
) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield the place and the cells of every row of a CSV file, or .csv.gz, all of them stripped.

    A row with too few or too many cells is a problem. A file that is missing, not text, empty, or
    without one of the columns always raises DataError: no row of it could be used.
    """
    if not path.is_file():
        raise DataError(f"{path}: missing table: there is no such file")
    try:
        with _open(path) as file:
            reader = csv.reader(file, strict=True)
            head = [name.strip() for name in next(reader, [])]
            lacking = [name for name in columns if name not in head]
            if lacking:
                raise DataError(
                    f"{path}: malformed table: it has no column {', '.join(lacking)}; "
                    f"its columns are {', '.join(head) or 'none'}"
                )
            for row in reader:
                place = f"{path}:{reader.line_num}"
                if not row:
                    continue
                if len(row) != len(head):
                    problems.add(
                        place, "malformed row", f"it has {len(row)} cells, the head {len(head)}"
                    )
                    continue
                yield place, dict(zip(head, (cell.strip() for cell in row), strict=True))
    except (UnicodeDecodeError, csv.Error, gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise DataError(f"{path}: malformed table: it is not CSV text: {error}") from error


def _open(path: Path) -> TextIO:
    if path.suffix == ".gz":
        return gzip.open(path, "rt", newline="", encoding="utf-8-sig")
    return path.open(newline="", encoding="utf-8-sig")
