"""The demo's page: pictures and plain words around the measured rows."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sparseattn.cli.demo_saliency import STEPS, SaliencyPanel
from sparseattn.cli.demo_vit import CONTRAST_WEIGHT, SHARPNESS
from sparseattn.viz import pictures
from sparseattn.viz.report import Picture, Row, Selection, difference, html_page

QUERY_PLACE = (0.45, 0.3)  # of the height and the width: in a lung, on the usual chest picture
OUTLINED_HEAD = 0


@dataclass(frozen=True, eq=False)
class Findings:
    """What the demo measured.

    rows        the comparison; the last row keeps every tile
    selections  ways to choose the tiles; the first is the one used in `rows`
    picture     [S, S] in [0, 1]     states  int [H, R, C] block states of the first block's mask
    errors      [G, G] relative error of each patch's attention output     tile  side in pixels
    saliency    what a predictor learned on the picture; its row is the last but one
    facts       name and value of what was run
    """

    rows: Sequence[Row]
    selections: Sequence[Selection]
    picture: Tensor
    states: Tensor
    errors: Tensor
    saliency: SaliencyPanel
    tile: int
    facts: Sequence[tuple[str, str]]


def write_page(findings: Findings, folder: Path) -> Path:
    """Write `index.html` into `folder` and return its path."""
    *compared, exact = findings.rows
    page = html_page(
        title="Dense and block-sparse attention on a chest radiograph",
        lead=(
            "A vision transformer with random weights reads one radiograph twice: with attention "
            "over all patches, and with attention over a few tiles of patches. The page shows "
            "what that saves, and what it changes."
        ),
        cards=_cards(compared, exact),
        rows=findings.rows,
        table_notes=_table_notes(exact),
        pictures=_pictures(findings),
        selections=findings.selections,
        selection_note=_selection_note(findings.selections),
        notes=_notes(exact, findings.saliency),
        facts=findings.facts,
    )
    path = folder / "index.html"
    path.write_text(page, encoding="utf-8")
    return path


def _cards(compared: Sequence[Row], exact: Row) -> list[tuple[str, str]]:
    *attention, stack, _ = compared
    largest = attention[-1]
    memory = largest.sparse_bytes / max(largest.dense_bytes, 1)
    return [
        (
            f"{largest.step_ratio:.1f}x",
            f"attention by itself, forward and backward, {largest.tokens} tokens, "
            f"{largest.kept:.0%} kept",
        ),
        (
            f"{stack.step_ratio:.1f}x",
            f"whole stack, forward and backward, {stack.tokens} tokens, {stack.kept:.0%} kept",
        ),
        (f"{memory:.2f}x", f"of dense attention's peak extra memory, {largest.tokens} tokens"),
        (
            difference(max(exact.output_difference, exact.gradient_difference)),
            "largest difference to dense, output and gradients, when all tiles are kept",
        ),
    ]


def _table_notes(exact: Row) -> list[str]:
    return [
        "Times are medians in ms, dense and sparse in turn in one process, after a warm-up of "
        "both. Sparse times include choosing the tiles and building their lists.",
        "Dense is torch's scaled_dot_product_attention. fwd+bwd computes all gradients: of q, k "
        "and v for attention, of the pixels and of every weight for the stack.",
        "Error: Euclidean norm of the difference to dense over the norm of dense, for the output "
        "and for the gradients (of q, k and v together; for the stack, of the pixels).",
        "Extra MB (millions of bytes): the most held at once during fwd+bwd beyond what was "
        "held before, results included. On a CPU it is summed from the allocations that torch's "
        "profiler saw, so scratch memory inside MKL or oneDNN is not in it; on a GPU it is "
        "torch.cuda.max_memory_allocated.",
        "Salient tokens: saliency_attention to the most salient patches, the same for all queries "
        "and heads, choice included, predictor not.",
        "The row with all tiles kept must equal dense up to rounding. Largest differences: "
        f"{difference(exact.output_difference)} in the output, "
        f"{difference(exact.gradient_difference)} in the gradients.",
    ]


def _verdict(ratio: float) -> str:
    if ratio < 1:
        return f"takes {1 / ratio:.2f} times as long as dense"
    return f"is {ratio:.2f} times as fast as dense"


def _pictures(findings: Findings) -> list[Picture]:
    picture, kept = findings.picture, findings.states != -1  # [H, R, C]
    heads, tiles, _ = kept.shape
    side = round(tiles**0.5)
    query = int(QUERY_PLACE[0] * side) * side + int(QUERY_PLACE[1] * side)
    of_query = kept[:, query].float().mean(0)
    overall = kept.float().mean((0, 1))
    low, high = overall.aminmax()
    worst = findings.errors.max()
    return [
        Picture(
            "The input",
            f"{picture.shape[0]} x {picture.shape[1]} pixels, cut into {tiles} tiles of "
            f"{findings.tile} x {findings.tile}. Dense tissue is bright.",
            "Grey chest radiograph, square crop.",
            pictures.image_picture(picture),
        ),
        Picture(
            "Key tiles kept for one query tile",
            f"Blue: the query tile. Orange outlines: tiles kept by head {OUTLINED_HEAD + 1}. "
            f"Orange tint: the more of the {heads} heads keep a tile, the stronger. "
            f"First block; {int(kept[OUTLINED_HEAD, query].sum())} of {tiles} tiles outlined.",
            "Radiograph with the kept tiles tinted orange and the query tile outlined in blue.",
            pictures.kept_tiles_picture(picture, of_query, kept[OUTLINED_HEAD, query], query),
        ),
        Picture(
            "How often each tile is kept",
            "Share of all query tiles and heads of the first block that keep this key tile: "
            f"from {float(low):.0%} to {float(high):.0%}. Contrast draws tiles with strong edges, "
            "the border of the exposed field among them.",
            "Radiograph with a heat map: how often each tile is kept as a key.",
            pictures.tile_share_picture(picture, overall, "share of queries and heads"),
        ),
        Picture(
            "Error of the attention output",
            "Relative difference to dense for each patch, all heads of the first block; the "
            f"largest is {float(worst):.2f}.",
            "Radiograph with a heat map: relative error of the attention output per patch.",
            pictures.error_picture(picture, findings.errors, "relative error"),
        ),
        _saliency_picture(findings),
        Picture(
            f"The mask of head {OUTLINED_HEAD + 1}",
            "One row per query tile, one column per key tile, both in reading order over the "
            "picture. The diagonal is always kept.",
            "Grid of blocks: kept ones dark, skipped ones pale.",
            pictures.block_mask_picture(findings.states[OUTLINED_HEAD], query),
        ),
        Picture(
            "How large the error is",
            "How many patches have which error. Dashed: the middle one "
            f"({float(torch.quantile(findings.errors.float(), 0.5)):.2f}).",
            "Histogram of the relative error per patch.",
            pictures.histogram_picture(findings.errors, "relative error of a patch"),
        ),
    ]


def _saliency_picture(findings: Findings) -> Picture:
    panel = findings.saliency
    return Picture(
        "Patches that a predictor keeps",
        f"Orange: {panel.share:.0%} of the patches, the most salient ones by a small network that "
        f"learned, in {STEPS} steps on this picture, how much attention each patch of the first "
        f"block receives. They receive {panel.mass:.0%} of it, chance would give "
        f"{panel.share:.0%}, the best choice {panel.best:.0%}.",
        "Radiograph with the kept patches tinted orange.",
        pictures.kept_patches_picture(findings.picture, panel.kept),
    )


def _selection_note(selections: Sequence[Selection]) -> str:
    used, chance = selections[0], selections[-1]
    best = min(selections, key=lambda selection: selection.error)
    return (
        "Attention of the first block, four ways to choose tiles with the same --keep (the "
        "query's own tile comes on top where it is not chosen). Mass is the part of the dense "
        "attention weights that falls on kept tiles, averaged over queries and heads. The way "
        f"used here keeps {used.mass:.0%} of it and chance {chance.mass:.0%}; the errors are "
        f"{used.error:.3f} and {chance.error:.3f}. Smallest error here: {best.name}. Keeping "
        "more mass does not always mean a smaller error: where attention is spread evenly, "
        "tiles chosen by chance are a fair sample of all."
    )


def _notes(exact: Row, panel: SaliencyPanel) -> list[str]:
    return [
        "The weights are random. Nothing but the predictor of saliency was trained, so no row says "
        "anything about accuracy on a task, and no picture says anything about the patient.",
        "Errors are measured against dense attention with the same weights. They depend on how "
        "concentrated attention is, and trained weights will give others.",
        "To make random weights look at the picture at all, patches are contrast-normalised, the "
        "query and key projections share their weights (a query looks for patches like its own), "
        f"and the logits are multiplied by {SHARPNESS:g}. These are choices of this demo.",
        "A key tile's score is the product of the mean query and the mean key, standardised over "
        f"the key tiles, plus {CONTRAST_WEIGHT:g} times the tile's local contrast (the standard "
        "deviation of its pixels, standardised). Contrast stands in for saliency here: it is a "
        "property of the picture, not a learned predictor. The choice itself has no gradient.",
        f"In the saliency panel {panel.summary()}. It knows this picture only. One choice for all "
        "queries and heads cannot serve them as well as a choice for each: compare the errors.",
        "The stack gains less than attention by itself, because its projections and MLPs stay "
        "dense. The smaller the picture, the smaller the gain.",
        "Where nothing can be skipped there is nothing to gain: with all tiles kept, block-sparse "
        f"attention {_verdict(exact.step_ratio)}, forward and backward.",
    ]
