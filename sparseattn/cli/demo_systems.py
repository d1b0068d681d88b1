"""The demo's second page: one picture a reference model, each after a training of seconds."""

from __future__ import annotations

import contextlib
import io
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sparseattn.viz.report import Picture

FOLDER = "systems"
_COUNTS = ("step", "epoch", "keep")


@dataclass(frozen=True)
class Panel:
    """How one model is trained for its picture.

    data      a sample of real data
    options   of the training          changes   of the model's config
    """

    data: str
    options: Mapping[str, Any]
    changes: Mapping[str, Any]


PANELS = {
    "hyspark": Panel(
        "brain",
        {"epochs": 1, "batch_size": 16, "lr": 1e-2},
        {"width": 2, "heads": 2, "vit_depth": 1, "decoder_width": 16},
    ),
    "miram": Panel(
        "radiographs",
        {"epochs": 3, "lr": 5e-3},
        {
            "patch": 8, "dim": 32, "depth": 1, "heads": 2, "low_dim": 32, "low_depth": 1,
            "low_heads": 2, "high_dim": 32, "high_depth": 1, "high_heads": 2, "features": 32,
        },
    ),
    "adaptor": Panel("numbers", {"epochs": 1, "batch_size": 64, "lr": 2e-3}, {}),
    "sparseattnnet": Panel(
        "digits",
        {"epochs": 5, "batch_size": 64, "lr": 5e-3},
        {"dim": 32, "heads": 2, "coarse_width": 8, "keep": 0.15, "rule_low": 0.15},
    ),
    "sparsecontrast": Panel(
        "digits",
        {"epochs": 2, "lr": 5e-3},
        {"patch": 1, "dim": 32, "depth": 2, "heads": 2, "start": 1, "crop": 0.7, "keep": 0.25},
    ),
}  # fmt: skip


def write_systems_page(out: Path, seed: int, say: Callable[[str], None]) -> Path:
    """Train every model for some seconds, and write `out`/systems/index.html; return its path.

    A model whose packages cannot be imported is left out, by name.
    """
    from sparseattn.viz.run_page import write_run_page

    started = time.perf_counter()
    pictures, facts = [], []
    for name, panel in PANELS.items():
        say(f"{name} learns from {panel.data}")
        try:
            pictures.append(panel_picture(name, panel, seed))
            facts.append((name, _words(panel)))
        except ImportError as error:
            say(f"{name} is left out: {error}")
            facts.append((name, f"left out: {error}"))
    return write_run_page(
        out / FOLDER,
        title="Reference models, one picture each",
        lead=(
            "Small versions of the reference models after a training of seconds on real samples. "
            "They show what each model does, not how well it can do it."
        ),
        cards=[
            (str(len(pictures)), "models trained"),
            (f"{time.perf_counter() - started:.0f} s", "all trainings and pictures"),
        ],
        pictures=pictures,
        facts=facts,
    )


def panel_picture(name: str, panel: Panel, seed: int) -> Picture:
    """Train a model in a folder of its own that is removed again; return its first picture."""
    from sparseattn.training.logs import EPOCHS, read_csv
    from sparseattn.training.loop import MODEL, load_run, train
    from sparseattn.training.options import TrainOptions

    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        options = TrainOptions(
            data=panel.data, out=str(out), seed=seed, device="cpu", **panel.options
        )
        started = time.perf_counter()
        with contextlib.redirect_stdout(io.StringIO()):
            train(name, options, panel.changes)
            seconds = time.perf_counter() - started
            recipe, _ = load_run(out)
            kind: Any = type(recipe).model_type
            model = kind.from_pretrained(str(out / MODEL)).eval()
        history, split = read_csv(out / EPOCHS), recipe.load(options)
        picture = recipe.pictures(model, split, history)[0]
    metrics = {k: v for k, v in history[-1].items() if not k.endswith("loss") and k not in _COUNTS}
    caption = (
        f"{recipe.summary[0].upper()}{recipe.summary[1:]}. {picture.caption} After "
        f"{history[-1]['step']:.0f} steps ({seconds:.0f} s) on {split.about}; on what is for "
        f"testing: {', '.join(f'{name} {value:.3g}' for name, value in metrics.items())}."
    )
    return replace(picture, title=f"{name}: {picture.title.lower()}", caption=caption)


def _words(panel: Panel) -> str:
    changes = {**panel.options, **panel.changes}
    return f"{panel.data}: {', '.join(f'{name}={value}' for name, value in changes.items())}"
