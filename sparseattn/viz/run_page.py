"""The page of one run: its figures, pictures and curves in one self-contained HTML file."""

import re
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from string import Template

import torch
from torch import Tensor

from sparseattn.viz.pictures import KEPT_COLOUR, figure_of, png_of
from sparseattn.viz.report import STYLE, Picture, html_picture


def write_run_page(
    folder: Path,
    *,
    title: str,
    lead: str,
    cards: Sequence[tuple[str, str]],
    pictures: Sequence[Picture],
    facts: Sequence[tuple[str, str]],
) -> Path:
    """Write index.html and one PNG a picture into `folder`; return the path of the page."""
    folder.mkdir(parents=True, exist_ok=True)
    for picture in pictures:
        name = re.sub(r"\W+", "_", picture.title.lower()).strip("_")
        (folder / f"{name}.png").write_bytes(picture.png)
    page = Template(_PAGE).substitute(
        title=escape(title),
        style=STYLE,
        lead=escape(lead),
        cards="\n".join(
            f'<div class="card"><b>{escape(value)}</b><span>{escape(text)}</span></div>'
            for value, text in cards
        ),
        pictures="\n".join(html_picture(picture) for picture in pictures),
        facts="\n".join(
            f'<tr><th scope="row">{escape(name)}</th><td>{escape(value)}</td></tr>'
            for name, value in facts
        ),
    )
    path = folder / "index.html"
    path.write_text(page, encoding="utf-8")
    return path


def curves_picture(
    x: Sequence[float], curves: Mapping[str, Sequence[float]], x_label: str, *, log: bool = False
) -> bytes:
    """Lines over the same x, with a legend; PNG."""
    figure, (axes,) = figure_of(1, width=5.2, height=3.6)
    for name, values in curves.items():
        axes.plot(x, values, label=name, linewidth=1.8, marker="." if len(x) < 30 else None)
    axes.set_xlabel(x_label)
    axes.set_yscale("log" if log else "linear")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    return png_of(figure)


def images_picture(
    images: Tensor,
    titles: Sequence[str],
    *,
    marked: Sequence[Tensor] | None = None,
    heat: Tensor | None = None,
) -> bytes:
    """Several grey images [B, H, W] in a row, each with its title; PNG.

    marked: for each image, the numbers of the pixels that are outlined. heat: [B, H, W] in [0, 1],
    drawn under each image.
    """
    rows = 1 if heat is None else 2
    figure, axes = figure_of(len(images) * rows, columns=len(images), width=1.5 * len(images))
    for i, (image, title) in enumerate(zip(images.float().cpu(), titles, strict=True)):
        axes[i].imshow(image.numpy(), cmap="gray", vmin=0, vmax=max(1.0, float(image.max())))
        axes[i].set_title(title, fontsize="small")
        if marked is not None:
            _mark(axes[i], marked[i].cpu(), image)
    for axes_of_heat, values in zip(
        axes[len(images) :], heat if heat is not None else (), strict=True
    ):
        axes_of_heat.imshow(values.float().cpu().numpy(), cmap="viridis", vmin=0, vmax=1)
    for one in axes:
        one.set_axis_off()
    return png_of(figure)


def rows_picture(rows: Mapping[str, Tensor]) -> bytes:
    """Rows of images [B, H, W], or [B, H, W, 3] in colour, in [0, 1], with their names; PNG."""
    columns = len(next(iter(rows.values())))
    figure, axes = figure_of(len(rows) * columns, columns=columns, width=1.4 * columns)
    for i, (name, images) in enumerate(rows.items()):
        for j, image in enumerate(images.float().cpu()):
            one = axes[i * columns + j]
            one.imshow(image.numpy(), cmap="gray", vmin=0, vmax=1)
            one.set_xticks([])
            one.set_yticks([])
            if j == 0:
                one.set_ylabel(name, fontsize="small")
    return png_of(figure)


def planes_picture(volumes: Mapping[str, Tensor]) -> bytes:
    """The middle slices of volumes [S, S, S] or [S, S, S, 3] in [0, 1], a row each; PNG."""
    return rows_picture(
        {
            name: torch.stack([volume.select(axis, volume.shape[axis] // 2) for axis in range(3)])
            for name, volume in volumes.items()
        }
    )


def coloured(volume: Tensor, classes: Tensor) -> Tensor:
    """Tint grey voxels [...] by their classes int [...]; 0 stays grey. Returns [..., 3]."""
    import matplotlib

    tints = torch.from_numpy(matplotlib.colormaps["Set1"]((classes.cpu().numpy() - 1) % 9))
    strength = 0.5 * (classes.cpu() > 0)[..., None]
    return volume.float().cpu()[..., None] * (1 - strength) + tints[..., :3] * strength


def matrix_picture(values: Tensor, x_label: str, y_label: str) -> bytes:
    """A matrix as a heat map with its scale; PNG."""
    figure, (axes,) = figure_of(1, width=4.4, height=4.0)
    heat = axes.imshow(values.float().cpu().numpy(), cmap="viridis")
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    figure.colorbar(heat, ax=axes, fraction=0.046)
    return png_of(figure)


def _mark(axes: object, pixels: Tensor, image: Tensor) -> None:
    """Tint and outline the pixels of those numbers."""
    from matplotlib.colors import to_rgb

    chosen = torch.zeros(image.numel(), dtype=torch.bool)
    chosen[pixels] = True
    tint = torch.zeros(*image.shape, 4)
    tint[..., :3] = torch.tensor(to_rgb(KEPT_COLOUR))
    tint[..., 3] = 0.55 * chosen.reshape(image.shape)
    axes.imshow(tint.numpy(), interpolation="nearest")  # type: ignore[attr-defined]


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>$style
.pictures { grid-template-columns: repeat(2, 1fr); }
</style>
</head>
<body>
<main>
<h1>$title</h1>
<p class="lead">$lead</p>
<div class="cards">
$cards
</div>
<h2>Pictures</h2>
<div class="pictures">
$pictures
</div>
<h2>What was run</h2>
<table class="facts"><tbody>
$facts
</tbody></table>
</main>
</body>
</html>
"""
