"""HySparK: the sparse encoder is the dense one times the mask, at a part of its cost."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sparseattn.benchmarks.timing import CpuTimer, Job, interleave
from sparseattn.claims.finding import Effort, Finding, found
from sparseattn.models import HySparK, HySparKConfig
from sparseattn.models.hyspark import HySparKEncoder
from sparseattn.structures.patch_grid import PatchGrid
from sparseattn.structures.patch_mask import PatchMask
from sparseattn.testing.hyspark import masked_encoder
from sparseattn.testing.tolerance import Judgement, judge

SMALL = HySparKConfig(image_size=32, width=2, vit_depth=1, heads=2, decoder_width=16, mask=0.5)
TIMED = HySparKConfig(image_size=64, width=16, heads=6, decoder_width=384)
KEEPS = (0.1, 0.25, 0.5, 1.0)
NAMES = ("x1", "x2", "x3", "x4", "x5", "gradient of the images")


def sparse_encoder(effort: Effort) -> Finding:
    """Compare maps and gradients with dense convolutions times the mask, and the times of both."""
    wrong = [judgement for judgement in equality(SMALL) if not judgement.passed]
    shares = active_shares()
    times = encoder_times(effort.seconds)
    ratios = ", ".join(
        f"{times[f'{keep:.0%}'] / times['dense']:.2f} at {keep:.0%}" for keep in KEEPS
    )
    other = times["step"] - times["25%"]  # decoder and loss
    measured = (
        f"{len(NAMES) - len(wrong)} of {len(NAMES)} results (five maps, one gradient) are equal to "
        f"float32 rounding; active share of each volume: {_listed(shares)}; encoder forward and "
        f"backward over dense × mask, {TIMED.image_size}³ voxels, width {TIMED.width}: {ratios} of "
        f"the cells kept; a whole step at 25% {times['step'] / (other + times['dense']):.2f}, as "
        "its decoder is dense"
    )
    claim = "HySparK: a sparse encoder that equals the masked dense one"
    holds = not wrong and set(shares) == {0.25} and times["25%"] < times["dense"]
    return found(claim, measured, holds)


def equality(config: HySparKConfig) -> list[Judgement]:
    """Hold maps and the gradient of two volumes with different masks against float64."""
    torch.manual_seed(0)
    encoder = HySparK(config).encoder
    images = torch.randn(2, config.channels, *[config.image_size] * 3)
    mask = PatchMask.from_scores(torch.rand(2, *[config.side] * 3), config.kept)
    wide = copy.deepcopy(encoder).double()
    weights: list[Tensor] = []

    def run(maps_of: Callable[[Tensor], list[Tensor]], dtype: torch.dtype) -> list[Tensor]:
        x = images.to(dtype, copy=True).requires_grad_()
        maps = maps_of(x)
        weights.extend(torch.randn_like(m) for m in maps[len(weights) :])
        loss = [(m * w.to(dtype)).sum() for m, w in zip(maps, weights, strict=True)]
        (gradient,) = torch.autograd.grad(torch.stack(loss).sum(), x)
        return [*(m.detach() for m in maps), gradient]

    sparse = run(lambda x: _sparse_maps(encoder, x, mask), torch.float32)
    naive = run(lambda x: masked_encoder(encoder, x, mask), torch.float32)
    exact = run(lambda x: masked_encoder(wide, x, mask), torch.float64)
    return [
        judge(name, s, n, e, e.abs() + e.abs().mean())
        for name, s, n, e in zip(NAMES, sparse, naive, exact, strict=True)
    ]


def active_shares() -> list[float]:
    """Return the share of active cells of four volumes, as ``HySparK`` masks 96^3 voxels."""
    config = HySparKConfig()
    mask = PatchMask.from_scores(torch.rand(4, *[config.side] * 3), config.kept)
    return (mask.table >= 0).flatten(1).double().mean(1).tolist()


def encoder_times(seconds: float) -> dict[str, float]:
    """Time the encoder forward and backward: "10%" to "100%" of the cells, and "dense" × mask.

    "step" is forward and backward of the whole model with a quarter of the cells. seconds: that
    one of them may take for all its runs.
    """
    torch.manual_seed(0)
    images = torch.rand(1, 1, *[TIMED.image_size] * 3)
    model = HySparK(TIMED)
    encoder, cells = model.encoder, TIMED.side**3

    def drawn(keep: float) -> PatchMask:
        return PatchMask.from_scores(torch.rand(1, *[TIMED.side] * 3), round(keep * cells))

    def maps_of(mask: PatchMask, dense: bool) -> Job:
        maps = masked_encoder if dense else _sparse_maps
        return Job(lambda _: _summed(maps(encoder, images, mask)).backward())

    jobs = {f"{keep:.0%}": maps_of(drawn(keep), dense=False) for keep in KEEPS}
    quarter = drawn(0.25)
    jobs["dense"] = maps_of(quarter, dense=True)
    jobs["step"] = Job(lambda _: model(images, quarter).loss.backward())
    return {name: span.p50 for name, span in interleave(jobs, CpuTimer(), 1, 5, seconds).items()}


def _sparse_maps(encoder: HySparKEncoder, images: Tensor, mask: PatchMask) -> list[Tensor]:
    return [grid.to_dense() for grid in encoder(PatchGrid.from_dense(images, mask))]


def _summed(maps: Sequence[Tensor]) -> Tensor:
    return torch.stack([m.sum() for m in maps]).sum()


def _listed(shares: Sequence[float]) -> str:
    return ", ".join(f"{share:g}" for share in shares)
