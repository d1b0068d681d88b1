"""Measure a trained run on its test examples, and write its page."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal

from torch.utils.data import DataLoader

from sparseattn.data.split import Split, count
from sparseattn.training.logs import EPOCHS, STEPS, read_csv
from sparseattn.training.loop import MODEL, evaluate_model, load_run, make_accelerator
from sparseattn.training.options import TrainOptions, write_json
from sparseattn.training.recipe import Recipe
from sparseattn.viz.report import Picture
from sparseattn.viz.run_page import curves_picture, write_run_page

RESULT, REPORT = "evaluation.json", "report"


def evaluate(
    out: Path, data: str | None = None, device: Literal["auto", "cpu"] | None = None
) -> dict[str, float]:
    """Measure the latest weights of a run, and write evaluation.json and report/index.html.

    Args:
        out: folder of the run.
        data: other examples than those of the run.
        device: "auto" or "cpu", if it shall be another than the run's.

    Raises:
        ValueError: the folder holds no run, or the run has not finished an epoch yet.
    """
    recipe, options = load_run(out)
    options = dataclasses.replace(
        options, data=data or options.data, device=device or options.device
    )
    if not (out / MODEL / "model.safetensors").is_file():
        raise ValueError(f"{out} has no weights yet; expected a run that finished an epoch")
    split = recipe.load(options)
    accelerator = make_accelerator(options)
    model: Any = type(recipe).model_type.from_pretrained(str(out / MODEL))  # type: ignore[attr-defined]
    loader = DataLoader(split.test, batch_size=options.batch_size, num_workers=options.workers)
    wrapped, prepared = accelerator.prepare(model, loader)
    metrics = evaluate_model(accelerator, recipe, wrapped, prepared)
    if accelerator.is_main_process:
        write_json(out / RESULT, {"data": options.data, **metrics})
        plain = type(model).from_pretrained(str(out / MODEL)).eval()
        _write_page(out, recipe, options, plain, split, metrics)
    accelerator.wait_for_everyone()
    return metrics


def _write_page(
    out: Path,
    recipe: Recipe,
    options: TrainOptions,
    model: Any,
    split: Split,
    metrics: dict[str, float],
) -> None:
    """Write the page of the run from its weights and its logs."""
    history, steps = read_csv(out / EPOCHS), read_csv(out / STEPS)
    pictures = recipe.pictures(model, split, history)
    if steps:
        names = [name for name in steps[0] if name.endswith("loss")]
        curves = {name: [row[name] for row in steps] for name in names}
        pictures.append(
            Picture(
                "Losses",
                "Training losses of single batches, over the steps.",
                "Curves of the losses over the steps.",
                curves_picture(
                    [row["step"] for row in steps], curves, "step", log=_positive(curves)
                ),
            )
        )
    learn = sum(p.numel() for p in model.parameters() if p.requires_grad)
    facts = [
        ("data", split.about),
        ("examples", f"{count(split.train)} to train, {count(split.test)} to test"),
        ("parameters", f"{learn:,} learn, {sum(p.numel() for p in model.parameters()):,} in all"),
        *((name, str(value)) for name, value in dataclasses.asdict(options).items()),
        *((name, str(value)) for name, value in dataclasses.asdict(recipe.config).items()),
    ]
    write_run_page(
        out / REPORT,
        title=f"{recipe.name} on {Path(options.data).name}",
        lead=f"A reference model: {recipe.summary}. It was trained on {split.about}.",
        cards=[(f"{value:.3f}", name) for name, value in metrics.items()],
        pictures=pictures,
        facts=facts,
    )


def _positive(curves: dict[str, list[float]]) -> bool:
    return all(value > 0 for values in curves.values() for value in values)
