"""Pictures over an image: kept tiles, how often a tile is kept, a mask's blocks, errors.

Every function returns the bytes of a PNG. Images are [S, S] float in [0, 1]; a tile grid has its
row 0 at the top. matplotlib is imported on the first call.
"""

from io import BytesIO
from math import isqrt
from typing import Any

import torch
from torch import Tensor

DPI = 160
SIDE_INCHES = 4.0
KEPT_COLOUR, QUERY_COLOUR = "#ff9d2e", "#19d3ff"


def image_picture(image: Tensor) -> bytes:
    """The image by itself."""
    figure, axes = _figure()
    _show_image(axes, image)
    return png_of(figure)


def kept_tiles_picture(image: Tensor, shares: Tensor, outlined: Tensor, query: int) -> bytes:
    """The key tiles that one query tile keeps.

    Args:
        image: [S, S].
        shares: [tiles] share of the heads that keep each tile: the strength of the tint.
        outlined: bool [tiles] tiles kept by the head that gets outlines.
        query: number of the query tile; it gets its own outline.
    """
    figure, axes = _figure()
    _show_image(axes, image)
    side = isqrt(shares.numel())
    _tint(axes, image, 0.6 * shares.reshape(side, side))
    for tile in outlined.nonzero().flatten().tolist():
        _outline(axes, image, side, tile, KEPT_COLOUR, 1.4)
    _outline(axes, image, side, query, QUERY_COLOUR, 3.0)
    return png_of(figure)


def kept_patches_picture(image: Tensor, kept: Tensor) -> bytes:
    """The patches that are kept, bool [G, G], tinted."""
    figure, axes = _figure()
    _show_image(axes, image)
    _tint(axes, image, 0.55 * kept.float())
    return png_of(figure)


def tile_share_picture(image: Tensor, shares: Tensor, label: str) -> bytes:
    """One number per tile [tiles], as a heat map over the image with its scale."""
    side = isqrt(shares.numel())
    return _heat_picture(image, shares.reshape(side, side), label, "viridis")


def error_picture(image: Tensor, errors: Tensor, label: str) -> bytes:
    """One error per patch [G, G], as a heat map over the image with its scale."""
    return _heat_picture(image, errors, label, "inferno")


def block_mask_picture(states: Tensor, query: int) -> bytes:
    """The blocks of one head's mask.

    Args:
        states: [R, C] int; -1 is empty, -2 is full, anything else is a partial block
            (`BlockMask.block_states()` of one head).
        query: the query block whose row is marked.
    """
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch, Rectangle

    figure, axes = _figure(height=SIDE_INCHES + 0.65)
    kinds = torch.where(states == -1, 0, torch.where(states == -2, 2, 1)).cpu()
    colours = ["#eef1f4", "#f2c49b", "#b4480f"]
    axes.imshow(kinds.numpy(), cmap=ListedColormap(colours), vmin=0, vmax=2)
    box = Rectangle(
        (-0.5, query - 0.5), kinds.shape[1], 1, fill=False, edgecolor="#0077a8", linewidth=1.6
    )
    axes.add_patch(box)
    axes.set_xlabel("key tile")
    axes.set_ylabel("query tile")
    names = ["skipped", "partial", "kept"]
    present = [i for i in range(3) if bool((kinds == i).any())]
    handles = [Patch(facecolor=colours[i], edgecolor="#8896a5", label=names[i]) for i in present]
    handles.append(Patch(fill=False, edgecolor="#0077a8", label="query tile shown"))
    axes.legend(
        handles=handles,
        loc="upper center",
        bbox_to_anchor=(0.5, -0.14),
        ncols=len(handles),
        frameon=False,
        fontsize="small",
        columnspacing=1.2,
    )
    return png_of(figure)


def histogram_picture(values: Tensor, label: str) -> bytes:
    """How often each size of `values` occurs, with the median marked."""
    figure, axes = _figure(height=SIDE_INCHES + 0.65)
    flat = values.float().flatten().cpu()
    axes.hist(flat.numpy(), bins=40, color="#b4480f", edgecolor="white", linewidth=0.4)
    axes.axvline(float(flat.median()), color="#1d2733", linestyle="--", linewidth=1.4)
    axes.set_xlabel(label)
    axes.set_ylabel("patches")
    axes.spines[["top", "right"]].set_visible(False)
    return png_of(figure)


def _heat_picture(image: Tensor, values: Tensor, label: str, colours: str) -> bytes:
    figure, axes = _figure(height=SIDE_INCHES + 0.65)
    _show_image(axes, image, brightest=0.55)
    heat = axes.imshow(
        values.float().cpu().numpy(),
        extent=_extent(image),
        cmap=colours,
        vmin=0,
        alpha=0.62,
        interpolation="nearest",
    )
    bar = figure.colorbar(heat, ax=axes, location="bottom", fraction=0.046, pad=0.02)
    bar.solids.set_alpha(1)
    bar.set_label(label)
    return png_of(figure)


def _figure(height: float = SIDE_INCHES) -> tuple[Any, Any]:
    figure, (axes,) = figure_of(1, height=height)
    return figure, axes


def figure_of(
    panels: int, *, columns: int = 1, width: float = SIDE_INCHES, height: float | None = None
) -> tuple[Any, list[Any]]:
    """A figure with its axes, outside pyplot: nothing global, no window, no cleaning up.

    Without a height, panels are about square.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('pictures need matplotlib; pip install "sparseattn[demo]"') from error
    rows = -(-panels // columns)
    if height is None:
        height = rows * (width / columns + 0.25)
    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    return figure, [figure.add_subplot(rows, columns, i + 1) for i in range(panels)]


def _show_image(axes: Any, image: Tensor, brightest: float = 1.0) -> None:
    """Show the image in grey; a lower `brightest` leaves room for colours on top."""
    pixels = image.float().cpu().numpy()
    axes.imshow(pixels, cmap="gray", vmin=0, vmax=1 / brightest, extent=_extent(image))
    axes.set_axis_off()


def _tint(axes: Any, image: Tensor, strength: Tensor) -> None:
    """Lay the colour of what is kept over the image, as strong as a grid [G, G] says."""
    from matplotlib.colors import to_rgb

    tint = torch.zeros(*strength.shape, 4)
    tint[..., :3] = torch.tensor(to_rgb(KEPT_COLOUR))
    tint[..., 3] = strength.float().cpu()
    axes.imshow(tint.numpy(), extent=_extent(image), interpolation="nearest")


def _extent(image: Tensor) -> tuple[float, float, float, float]:
    height, width = image.shape
    return (0.0, float(width), float(height), 0.0)


def _outline(
    axes: Any, image: Tensor, side: int, tile: int, colour: str, line_width: float
) -> None:
    from matplotlib.patches import Rectangle

    height, width = image.shape[0] / side, image.shape[1] / side
    corner = (tile % side * width, tile // side * height)
    box = Rectangle(corner, width, height, fill=False, edgecolor=colour, linewidth=line_width)
    axes.add_patch(box)


def png_of(figure: Any) -> bytes:
    """Return a figure as PNG."""
    buffer = BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
