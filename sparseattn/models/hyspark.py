"""HySparK: masked pre-training of a hybrid of sparse 3-D convolutions and a ViT.

The released architecture, losses and masking; ``HySparK`` says which of the released code's faults
are mended and what is left open.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn

from sparseattn import checks
from sparseattn.layers.sparse_norm import SparseLayerNorm
from sparseattn.layers.submanifold_conv3d import SubmanifoldConv3d
from sparseattn.models.transformer import TransformerBlock, normalised, sincos_positions
from sparseattn.ops.densify import densify
from sparseattn.ops.sparse_max_pool3d import sparse_max_pool3d
from sparseattn.structures.patch_grid import PatchGrid
from sparseattn.structures.patch_mask import PatchMask

_OP = "HySparK"
CELL = 16  # voxels of a cell's side: the stride of the encoder
_STEPS = 4  # times the encoder halves
_WIDTHS = (1, 2, 4, 8, 12, 12)  # channels in front of each stage and behind the last, over width
_BLOCKS = (1, 1, 3, 3, 1)  # of each stage
_RATIOS = (2, 4, 4, 4, 2)  # hidden channels of a stage's blocks, over its channels


@dataclass(frozen=True)
class HySparKConfig:
    """The released values, and what can be changed.

    image_size    side of the volumes, a multiple of 16
    channels      of a volume
    width         channels of the first stage; the others have 2, 4, 8 and 12 times as many
    vit_depth, heads  of the ViT on the kept cells, whose width is 12 * width. The released code
                  takes image_size / 8 heads: 12
    decoder_width channels of the deepest level of the decoder; every step halves them
    mask          share of the cells that is hidden
    full_skip     also give the decoder the map of full resolution. The released code computes it
                  and leaves it out
    released      build the modules of the released code that are never used, too, so that shapes
                  and counts of parameters are those of its checkpoints
    classes       of ``HySparKSegmenter``
    """

    image_size: int = 96
    channels: int = 1
    width: int = 32
    vit_depth: int = 3
    heads: int = 12
    decoder_width: int = 768
    mask: float = 0.75
    full_skip: bool = False
    released: bool = False
    classes: int = 3

    def __post_init__(self) -> None:
        for name in ("image_size", "channels", "width", "vit_depth", "heads", "classes"):
            checks.require_int(_OP, name, getattr(self, name), low=1)
        if self.image_size % CELL:
            raise ValueError(
                f"{_OP}: image_size is {self.image_size}; expected a multiple of {CELL}"
            )
        if self.dim % self.heads:
            raise ValueError(
                f"{_OP}: heads is {self.heads}; expected a divisor of 12 * width, dim={self.dim}"
            )
        if self.decoder_width % 2**_STEPS or self.decoder_width < 2**_STEPS:
            raise ValueError(
                f"{_OP}: decoder_width is {self.decoder_width}; expected a multiple of {2**_STEPS}"
            )
        if not 0 < self.mask < 1 or not 0 < self.kept < self.side**3:
            raise ValueError(
                f"{_OP}: mask is {self.mask}; expected a share in (0, 1) that hides a cell and "
                f"leaves one, cells={self.side**3} (from image_size)"
            )
        if self.released and self.full_skip:
            raise ValueError(f"{_OP}: full_skip is True; expected False, released=True")

    @property
    def side(self) -> int:
        """How many cells a volume is wide."""
        return self.image_size // CELL

    @property
    def dim(self) -> int:
        """Width of the ViT."""
        return _WIDTHS[-1] * self.width

    @property
    def kept(self) -> int:
        """How many cells of each volume are kept."""
        return round(self.side**3 * (1 - self.mask))


class HySparKOutput(NamedTuple):
    """What pre-training returns.

    loss           mean of errors [B]: mean square error over the hidden cells of each volume
    reconstruction [B, channels, X, Y, Z], of cells normalised by their own mean and deviation
    mask           which cells were kept
    """

    loss: Tensor
    errors: Tensor
    reconstruction: Tensor
    mask: PatchMask


class HySparK(
    nn.Module,
    PyTorchModelHubMixin,
    library_name="sparseattn",
    tags=["sparse-convolution", "masked-image-modelling"],
):
    """Fill in the hidden cells of volumes, computing the encoder on the kept ones alone.

    ::

        K = kept of the cells of 16^3 voxels, drawn for each volume
        x1 .. x4 = convolutional stages on the voxels of K, pooled by 2 between them
        x5 = ViT(stage 5, one token a kept cell)
        y = decoder(densify(x5) to densify(x2)), tokens in hidden cells
        loss = mean over hidden cells of (y - (cell - its mean) / sqrt(its variance + 1e-6))^2

    Bottom-up masking: the mask is drawn where convolutions meet the ViT, a cell a token, and holds
    at every stage. Convolutions are submanifold, ``submanifold_conv3d`` on whole cells: the same
    numbers as dense convolutions multiplied by the mask after every operation, without computing
    what is hidden. A stage is blocks of depthwise 3^3 convolution, layer norm, 1^3 up, GELU and 1^3
    down with a residual, and a 3^3 convolution that widens; the last has none.

    As released: stages, widths, ViT, decoder, densify, masking at 0.75, loss. Otherwise than in
    the released code:

    - every volume keeps the same number of cells; there a count of the whole batch ended in an
      error for more than one volume, or in no sparsity;
    - no modules that never learn: 47.9 of its 103.5 million parameters (``released=True`` has them,
      and holds the positions as a parameter that does not learn, as there);
    - hidden cells do not exist in the encoder, so nothing can leak into the deepest map;
    - the mask is an argument and a result, not a global of a module;
    - heads are an option and not tied to the size of the volume. Positions are: they are fixed
      sines and cosines of the grid of cells;
    - under DistributedDataParallel gradients are averaged as usual.

    Open: whether the decoder should get the map of full resolution (full_skip), which the paper's
    text suggests and its code ignores. Fine-tuning: ``HySparKSegmenter``, with this decoder; the
    released one was left to another pipeline.

    Deterministic but for the masks, which torch's generator draws, in eval as in training; give
    ``mask`` to fix them. In training a volume depends on its batch mates through the decoder's
    batch norms.

    Reference: "HySparK: Hybrid Sparse Masking for Large Scale Medical Image Pre-Training", 2024,
    arXiv 2408.05815.
    """

    def __init__(self, config: HySparKConfig | None = None) -> None:
        super().__init__()
        config = HySparKConfig() if config is None else config
        self.config = config
        self.encoder = HySparKEncoder(config)
        self.decoder = HySparKDecoder(config, config.channels)
        levels = self.encoder.widths[::-1]  # deepest first
        used = len(levels) if config.full_skip or config.released else len(levels) - 1
        self.tokens = nn.ParameterList(nn.Parameter(torch.empty(width)) for width in levels[:used])
        for token in self.tokens:
            nn.init.trunc_normal_(token, std=0.02)
        self.project = nn.ModuleList(projections(config, levels)[:used])
        if config.released:
            self.vit_token = nn.Parameter(torch.zeros(1, 1, config.dim))

    def forward(self, images: Tensor, mask: PatchMask | None = None) -> HySparKOutput:
        """Reconstruct volumes [B, channels, S, S, S]; the mask is drawn if it is not given."""
        check_images(images, self.config)
        if mask is None:
            scores = torch.rand((len(images), *[self.config.side] * 3), device=images.device)
            mask = PatchMask.from_scores(scores, self.config.kept)
        maps = self.encoder(PatchGrid.from_dense(images, mask))[::-1]
        used = len(maps) if self.config.full_skip else len(maps) - 1
        dense = [
            project(densify(x, token.to(x.dtype)))
            for x, token, project in zip(
                maps[:used], self.tokens[:used], self.project[:used], strict=True
            )
        ]
        found = self.decoder(dense)
        errors = self._errors(found, images, mask)
        return HySparKOutput(errors.mean(), errors, found, mask)

    def _errors(self, found: Tensor, images: Tensor, mask: PatchMask) -> Tensor:
        """Mean square error over the hidden cells of each volume, in float32."""
        target = normalised(to_cells(images).float())
        errors = (to_cells(found).float() - target).square().mean(-1)
        hidden = (mask.table < 0).flatten(1)
        return (errors * hidden).sum(1) / hidden.sum(1)

    @torch.no_grad()
    def reconstruct(self, images: Tensor, mask: PatchMask | None = None) -> "HySparKReconstruction":
        """Return volumes with what the encoder saw of them, and with the hidden cells filled in.

        Each predicted cell gets the mean and the deviation of the true one, which the model does
        not know.
        """
        output = self(images, mask)
        cells = to_cells(images)
        mean, spread = cells.mean(-1, keepdim=True), cells.std(-1, keepdim=True)
        hidden = (output.mask.table < 0).flatten(1)[..., None]
        predicted = to_cells(output.reconstruction).to(cells.dtype) * spread + mean
        filled = torch.where(hidden, predicted, cells)
        shown = cells.masked_fill(hidden, 0)
        side, channels = self.config.side, self.config.channels
        return HySparKReconstruction(
            images, from_cells(shown, side, channels), from_cells(filled, side, channels)
        )


class HySparKReconstruction(NamedTuple):
    """True volumes, what the encoder saw of them (0 elsewhere), and with the hidden part filled."""

    images: Tensor
    seen: Tensor
    filled: Tensor


class HySparKEncoder(nn.Module):
    """Five convolutional stages and a ViT, on active cells of 16^3 voxels."""

    def __init__(self, config: HySparKConfig) -> None:
        super().__init__()
        widths = [factor * config.width for factor in _WIDTHS]
        self.widths = [*widths[1:5], widths[5]]  # of the five maps that forward returns
        self.stem = SubmanifoldConv3d(config.channels, widths[0], 3)
        self.stages = nn.ModuleList(
            nn.Sequential(*(_ConvBlock(widths[i], _RATIOS[i]) for _ in range(_BLOCKS[i])))
            for i in range(len(_BLOCKS))
        )
        self.widen = nn.ModuleList(
            SubmanifoldConv3d(widths[i], widths[i + 1], 3) for i in range(_STEPS)
        )
        places = sincos_positions((config.side,) * 3, config.dim)
        self.positions: Tensor
        if config.released:
            self.positions = nn.Parameter(places, requires_grad=False)
        else:
            self.register_buffer("positions", places, persistent=False)
        self.blocks = nn.Sequential(
            *(TransformerBlock(config.dim, config.heads) for _ in range(config.vit_depth))
        )
        self.norm = nn.LayerNorm(config.dim)

    def forward(self, x: PatchGrid) -> list[PatchGrid]:
        """Return five maps, whose cells are 16, 8, 4, 2 and 1 voxels wide.

        Every volume has the same number of active cells.
        """
        maps = []
        x = self.stem(x)
        for i, stage in enumerate(self.stages):
            x = stage(x if i == 0 else sparse_max_pool3d(x, 2))
            if i < _STEPS:
                x = self.widen[i](x)
                maps.append(x)
        return [*maps, self._attend(x)]

    def _attend(self, x: PatchGrid) -> PatchGrid:
        """Let the active cells of each volume, which are tokens now, attend to each other."""
        cells = x.mask.table[0].numel()
        places = self.positions[x.mask.patches.long() % cells]
        tokens = rearrange(x.features, "(b n) 1 1 1 c -> b n c", b=x.batch)
        tokens = tokens + rearrange(places, "(b n) c -> b n c", b=x.batch).to(tokens.dtype)
        found = self.norm(self.blocks(tokens))
        return x.with_features(rearrange(found, "b n c -> (b n) 1 1 1 c"))


class _ConvBlock(nn.Module):
    """x + down(GELU(up(norm(depthwise(x))))), on active sites."""

    def __init__(self, width: int, ratio: int) -> None:
        super().__init__()
        self.depthwise = SubmanifoldConv3d(width, width, 3, groups=width)
        self.norm = SparseLayerNorm(width)
        self.up = nn.Linear(width, ratio * width)
        self.down = nn.Linear(ratio * width, width)

    def forward(self, x: PatchGrid) -> PatchGrid:
        """Return a map of the same size."""
        seen = self.norm(self.depthwise(x)).features
        return x.with_features(x.features + self.down(F.gelu(self.up(seen))))


class HySparKDecoder(nn.Module):
    """Dense maps of all levels, the deepest first, to a volume of full resolution.

    A step doubles the side and halves the channels; then a skip is joined, where there is one.
    """

    def __init__(self, config: HySparKConfig, out: int) -> None:
        super().__init__()
        widths = [config.decoder_width // 2**i for i in range(_STEPS + 1)]
        self.steps = nn.ModuleList(
            nn.Sequential(
                nn.ConvTranspose3d(wide, wide, 2, 2),
                *_normed(wide, narrow),
                *_normed(narrow, narrow),
            )
            for wide, narrow in pairwise(widths)
        )
        joined = widths[1:] if config.full_skip else widths[1:-1]
        self.fuse = nn.ModuleList(_fuse(width) for width in joined)
        self.unused = _fuse(widths[0]) if config.released else None
        self.head = nn.Conv3d(widths[-1], out, 1)

    def forward(self, maps: list[Tensor]) -> Tensor:
        """Return [B, out, X, Y, Z]."""
        x = maps[0]
        for i, step in enumerate(self.steps):
            x = step(x)
            if i < len(self.fuse):
                x = self.fuse[i](torch.cat([x, maps[i + 1]], 1))
        found: Tensor = self.head(x)
        return found


def _normed(source: int, target: int) -> tuple[nn.Module, ...]:
    return nn.Conv3d(source, target, 3, padding=1), nn.BatchNorm3d(target), nn.ReLU()


def _fuse(width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv3d(2 * width, width, 3, padding=1), nn.Conv3d(width, width, 3, padding=1)
    )


def projections(config: HySparKConfig, levels: list[int]) -> list[nn.Module]:
    """Return the maps to the decoder's widths, the deepest first: 1^3, and 3^3 above."""
    return [
        nn.Conv3d(level, config.decoder_width // 2**i, 3 if i else 1, padding=1 if i else 0)
        for i, level in enumerate(levels)
    ]


def to_cells(images: Tensor) -> Tensor:
    """Cut volumes [B, C, X, Y, Z] into cells [B, N, 16^3 * C], in raster order."""
    pattern = "b c (x p) (y q) (z r) -> b (x y z) (p q r c)"
    return rearrange(images, pattern, p=CELL, q=CELL, r=CELL)


def from_cells(cells: Tensor, side: int, channels: int) -> Tensor:
    """Undo ``to_cells`` for volumes that are `side` cells wide."""
    pattern = "b (x y z) (p q r c) -> b c (x p) (y q) (z r)"
    sizes = {"x": side, "y": side, "z": side, "p": CELL, "q": CELL, "c": channels}
    return rearrange(cells, pattern, **sizes)


def check_images(images: Tensor, config: HySparKConfig) -> None:
    """Refuse what are no volumes of the right size."""
    checks.require_tensor(_OP, "images", images)
    expected = [config.channels, *[config.image_size] * 3]
    if images.dim() != 5 or list(images.shape[1:]) != expected:
        sizes = ", ".join(map(str, expected))
        raise ValueError(f"{_OP}: images {checks.describe(images)}; expected [B, {sizes}]")
