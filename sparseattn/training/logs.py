"""What a run writes down while it trains: two CSV files, tensorboard, and a bar."""

import csv
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

STEPS, EPOCHS = "steps.csv", "epochs.csv"


class CsvLog:
    """Rows of numbers in a CSV file; the first row gives the columns.

    Opened with `after`, rows whose step is larger are removed first: a run that was killed wrote
    them after its last checkpoint, and they will come again.
    """

    def __init__(self, path: Path, after: int | None = None) -> None:
        self.path = path
        kept = [] if after is None else [row for row in read_csv(path) if row["step"] <= after]
        part = path.with_name(path.name + ".part")
        self._columns = list(kept[0]) if kept else []
        with part.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self._columns)
            if kept:
                writer.writeheader()
            writer.writerows(kept)
        part.replace(path)

    def write(self, row: Mapping[str, float]) -> None:
        """Append a row."""
        with self.path.open("a", newline="", encoding="utf-8") as file:
            fresh = not self._columns
            self._columns = self._columns or list(row)
            writer = csv.DictWriter(file, self._columns)
            if fresh:
                writer.writeheader()
            writer.writerow(row)


def read_csv(path: Path) -> list[dict[str, float]]:
    """Return the rows of a file that `CsvLog` wrote; none if there is no such file."""
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if None not in row.values()]
    return [{name: _number(text) for name, text in row.items()} for row in rows]


def _number(text: str) -> float:
    return int(text) if text.lstrip("-").isdigit() else float(text) if text else math.nan


class Logs:
    """CSV files and tensorboard of one run; silent in all processes but the first."""

    def __init__(self, out: Path, *, write: bool, after: int | None = None) -> None:
        self._write = write
        if not write:
            return
        from torch.utils.tensorboard import SummaryWriter

        self._steps = CsvLog(out / STEPS, after)
        self._epochs = CsvLog(out / EPOCHS, after)
        purge = None if after is None else after + 1
        self._board = SummaryWriter(str(out / "tensorboard"), purge_step=purge)

    def step(self, row: Mapping[str, float]) -> None:
        """Log what a few steps gave."""
        self._log(row, "steps")

    def epoch(self, row: Mapping[str, float]) -> None:
        """Log what an epoch gave."""
        self._log(row, "epochs")

    def _log(self, row: Mapping[str, float], kind: str) -> None:
        if not self._write:
            return
        (self._steps if kind == "steps" else self._epochs).write(row)
        for name, value in row.items():
            if name not in ("step", "epoch"):
                self._board.add_scalar(f"{kind}/{name}", value, int(row["step"]))
        self._board.flush()

    def close(self) -> None:
        """Close tensorboard's file."""
        if self._write:
            self._board.close()


class Progress:
    """A bar an epoch, with loss and images a second; a line an epoch where there is no terminal."""

    def __init__(self, *, show: bool) -> None:
        self._show = show
        self._bar: Any = None

    def begin(self, epoch: int, epochs: int, images: int, done: int) -> None:
        """Start the bar of an epoch of which `done` images were seen before."""
        from tqdm import tqdm  # type: ignore[import-untyped, unused-ignore]

        self._bar = tqdm(
            total=images,
            initial=done,
            desc=f"epoch {epoch}/{epochs}",
            unit=" images",
            leave=False,
            disable=not (self._show and sys.stderr.isatty()),
        )

    def advance(self, images: int) -> None:
        """Count the images of a step."""
        self._bar.update(images)

    def loss(self, loss: float) -> None:
        """Show the latest loss."""
        self._bar.set_postfix(loss=f"{loss:.4f}", refresh=False)

    def end(self, epoch: int, epochs: int, row: Mapping[str, float]) -> None:
        """Close the bar and say what the epoch gave."""
        self._bar.close()
        self.say(
            f"epoch {epoch}/{epochs}  "
            + "  ".join(f"{k} {v:.4g}" for k, v in row.items() if k not in ("step", "epoch"))
        )

    def say(self, line: str) -> None:
        """Print a line."""
        if self._show:
            print(line, flush=True)
