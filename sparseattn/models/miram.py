"""MIRAM: a masked autoencoder that reconstructs an image at two scales.

Reference model that follows the published description; the paper leaves much open, and ``MIRAM``
says what was chosen here.
"""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn

from sparseattn import checks
from sparseattn.models.transformer import (
    TransformerBlock,
    draw_kept,
    draw_weights,
    from_patches,
    is_masked,
    normalised,
    put_back,
    sincos_positions,
    take,
    to_patches,
)

_OP = "MIRAM"
_SIZES = ("image_size", "scale", "patch", "channels", "dim", "depth", "heads", "low_dim")
_MORE_SIZES = ("low_depth", "low_heads", "high_dim", "high_depth", "high_heads")
_LANDMARKS = ("features", "projected_keys", "landmarks")


@dataclass(frozen=True)
class MIRAMConfig:
    """What the paper leaves open, each with the choice made here.

    image_size       side of the low-resolution image, in pixels: what the encoder sees
    scale            the high-resolution image has `scale` times that side
    patch, channels  side of a patch, the same in pixels at both scales; channels of the image
    dim, depth, heads             of the encoder: ViT-B/16
    mask             share of the patches that is hidden
    low_dim, low_depth, low_heads      of the low-resolution decoder, which has softmax attention
    high_dim, high_depth, high_heads   of the high-resolution decoder
    high_method      its attention: "linformer", "performer", "nystrom", or "softmax" as a baseline
    features         random features of "performer"
    projected_keys   projected keys of "linformer"
    landmarks        most landmarks of "nystrom", each the mean of a box of the token grid
    high_input       what is interpolated: tokens of the "encoder", or those of the "low" decoder
    interpolation    of the token grid: "bilinear" or "nearest"
    normalise        targets are normalised, each patch by its own mean and standard deviation
    low_weight, high_weight       of the two losses
    mlp_ratio        hidden width of a block's MLP, in units of its width
    classes          of ``MIRAMClassifier``; the autoencoder does not use it
    pool             what is classified: the "mean" of the patch tokens, or the "class" token
    """

    image_size: int = 224
    scale: int = 2
    patch: int = 16
    channels: int = 1
    dim: int = 768
    depth: int = 12
    heads: int = 12
    mask: float = 0.75
    low_dim: int = 512
    low_depth: int = 8
    low_heads: int = 16
    high_dim: int = 512
    high_depth: int = 8
    high_heads: int = 16
    high_method: Literal["linformer", "performer", "nystrom", "softmax"] = "performer"
    features: int = 256
    projected_keys: int = 256
    landmarks: int = 64
    high_input: Literal["encoder", "low"] = "encoder"
    interpolation: Literal["bilinear", "nearest"] = "bilinear"
    normalise: bool = True
    low_weight: float = 1.0
    high_weight: float = 1.0
    mlp_ratio: float = 4.0
    classes: int = 2
    pool: Literal["mean", "class"] = "mean"

    def __post_init__(self) -> None:
        for name in (*_SIZES, *_MORE_SIZES, *_LANDMARKS, "classes"):
            checks.require_int(_OP, name, getattr(self, name), low=1)
        if self.image_size % self.patch:
            raise ValueError(
                f"{_OP}: image_size is {self.image_size}; expected a multiple of patch, "
                f"patch={self.patch}"
            )
        for part in ("", "low_", "high_"):
            width, heads = getattr(self, f"{part}dim"), getattr(self, f"{part}heads")
            if width % heads or width % 4:
                raise ValueError(
                    f"{_OP}: {part}dim is {width}; expected a multiple of 4 and of {part}heads, "
                    f"{part}heads={heads}"
                )
        if not 0 < self.mask < 1 or not 0 < self.kept < self.side**2:
            raise ValueError(
                f"{_OP}: mask is {self.mask}; expected a share in (0, 1) that hides a patch and "
                f"leaves one, patches={self.side**2} (from image_size)"
            )
        for name, options in (
            ("high_method", ("linformer", "performer", "nystrom", "softmax")),
            ("high_input", ("encoder", "low")),
            ("interpolation", ("bilinear", "nearest")),
            ("pool", ("mean", "class")),
        ):
            if getattr(self, name) not in options:
                raise ValueError(
                    f"{_OP}: {name} is {getattr(self, name)!r}; expected {' or '.join(options)}"
                )

    @property
    def side(self) -> int:
        """How many patches the low-resolution image is wide."""
        return self.image_size // self.patch

    @property
    def kept(self) -> int:
        """How many patches of an image the encoder sees."""
        return self.side**2 - round(self.mask * self.side**2)


class MIRAMOutput(NamedTuple):
    """What the autoencoder returns. Predictions are of normalised patches if the targets are.

    loss    low_weight * low_loss + high_weight * high_loss: the means of
    low_errors, high_errors   [B], mean square error over the hidden patches of each image
    low     [B, N, patch * patch * C], predicted patches     high    [B, scale^2 * N, ...]
    kept    int [B, kept], ascending: the patches that the encoder saw
    """

    loss: Tensor
    low_loss: Tensor
    high_loss: Tensor
    low_errors: Tensor
    high_errors: Tensor
    low: Tensor
    high: Tensor
    kept: Tensor


class MIRAM(
    nn.Module,
    PyTorchModelHubMixin,
    library_name="sparseattn",
    tags=["sparse-attention", "masked-autoencoder"],
):
    """Learn to see by filling in hidden patches, at the image's own scale and at a higher one.

    ::

        x_low = images averaged to image_size;  K = patches kept, the same number in every image
        t = encoder(patches of x_low at K, class token)
        low = decoder_low(t, a mask token elsewhere)                softmax attention, N tokens
        high = decoder_high(interpolate(t, a mask token elsewhere)) scale^2 N tokens, O(N) attention
        loss = low_weight * mse(low, x_low) + high_weight * mse(high, images)    over hidden patches

    Both losses are means over hidden patches; a hidden patch of the small image hides
    scale x scale of the large one. ``images`` have the high resolution, scale * image_size.

    Choices. The paper's method could not be read, only its abstract and summaries; so these are
    ours, and options of ``MIRAMConfig`` where a name is given:

    - the encoder and the low-resolution decoder are those of MAE (ViT-B/16 at 224; 8 blocks of
      width 512 with 16 heads; fixed sine and cosine positions; mask=0.75; class token), and so are
      normalised targets (normalise) and the mean over hidden patches alone;
    - the high-resolution decoder: twice the side (scale), as deep and wide as the other
      (high_dim, high_depth, high_heads), each token a patch of the larger image. Its input are the
      tokens of the encoder (high_input), mask tokens put in, interpolated on their grid
      (interpolation), with positions of the larger grid; without class token;
    - its attention (high_method), features, projected_keys and landmarks. Landmarks are means of
      boxes of the image, not of rows, and there is no residual convolution beside it;
    - how the losses are weighed (low_weight, high_weight);
    - what fine-tuning reads (pool) and that it trains everything: ``MIRAMClassifier``.

    Deterministic but for the masks, which torch's generator draws, in eval as in training; give
    ``kept`` to fix them.

    Reference: "MIRAM", 2025, arXiv 2503.07157; "Masked Autoencoders Are Scalable Vision Learners",
    2021, arXiv 2111.06377, for what is as in MAE.
    """

    def __init__(self, config: MIRAMConfig | None = None) -> None:
        super().__init__()
        config = MIRAMConfig() if config is None else config
        self.config = config
        out = config.patch**2 * config.channels
        low = (config.low_dim, config.low_depth, config.low_heads)
        high = (config.high_dim, config.high_depth, config.high_heads)
        source = config.dim if config.high_input == "encoder" else config.low_dim
        self.encoder = MIRAMEncoder(config)
        self.low = _Decoder(config.dim, *low, config.side, out, config, "dense", {}, True)
        method, options = _attention(config)
        large = config.side * config.scale
        masked = config.high_input == "encoder"
        self.high = _Decoder(source, *high, large, out, config, method, options, masked)
        draw_weights(self)

    def forward(self, images: Tensor, kept: Tensor | None = None) -> MIRAMOutput:
        """Reconstruct images [B, channels, scale * image_size, scale * image_size].

        kept: int [B, kept], ascending: the patches that the encoder sees, numbered row by row;
        drawn if it is not given.
        """
        check_images(images, self.config, low_too=False)
        kept = self._kept(images, kept)
        small = shrink(images, self.config)
        tokens = self.encoder(small, kept)
        seen = self.low.read(tokens, kept)
        low_tokens = self.low.attend(seen)
        high_tokens = self.high.attend(self._grow(tokens, low_tokens, kept))
        low, high = self.low.predict(low_tokens[:, 1:]), self.high.predict(high_tokens)
        hidden = is_masked(kept, self.config.side**2)
        low_errors = self._errors(low, small, hidden)
        high_errors = self._errors(high, images, self._hidden_above(hidden))
        losses = (low_errors.mean(), high_errors.mean())
        loss = self.config.low_weight * losses[0] + self.config.high_weight * losses[1]
        return MIRAMOutput(loss, *losses, low_errors, high_errors, low, high, kept)

    @torch.no_grad()
    def reconstruct(self, images: Tensor, kept: Tensor | None = None) -> "MIRAMReconstruction":
        """Return both scales as images, with what the encoder saw pasted in.

        Where targets are normalised, each predicted patch gets the mean and the deviation of the
        true one, which the model does not know.
        """
        output = self(images, kept)
        hidden = is_masked(output.kept, self.config.side**2)
        pairs = (
            (output.low, shrink(images, self.config), hidden),
            (output.high, images, self._hidden_above(hidden)),
        )
        found = []
        for predicted, truth, covered in pairs:
            patches = to_patches(truth, self.config.patch)
            if self.config.normalise:
                mean, spread = patches.mean(-1, keepdim=True), patches.std(-1, keepdim=True)
                predicted = predicted * spread + mean
            filled = torch.where(covered[..., None], predicted.to(patches.dtype), patches)
            height = truth.shape[2] // self.config.patch
            shown = patches.masked_fill(covered[..., None], 0)
            images_of = [from_patches(p, self.config.patch, height) for p in (shown, filled)]
            found += [truth, *images_of]
        return MIRAMReconstruction(*found)

    def _kept(self, images: Tensor, kept: Tensor | None) -> Tensor:
        if kept is None:
            return draw_kept(len(images), self.config.side**2, self.config.kept, images.device)
        shapes = checks.Shapes(_OP)
        shapes.set("B", len(images), "images")
        shapes.set("kept", self.config.kept, "mask")
        shapes.bind("kept", kept, "B kept")
        checks.require_dtype(_OP, "kept", kept, torch.int64)
        return kept

    def _grow(self, tokens: Tensor, low_tokens: Tensor, kept: Tensor) -> Tensor:
        """Return the tokens of the large grid, [B, scale^2 * N, high_dim]."""
        if self.config.high_input == "low":
            grid = self.high.embed(low_tokens[:, 1:])
        else:
            grid = self.high.fill(self.high.embed(tokens[:, 1:]), kept, self.config.side**2)
        grid = rearrange(grid, "b (h w) d -> b d h w", h=self.config.side)
        options: dict[str, Any] = {"mode": self.config.interpolation}
        if self.config.interpolation == "bilinear":
            options["align_corners"] = False
        grid = F.interpolate(grid, scale_factor=self.config.scale, **options)
        return rearrange(grid, "b d h w -> b (h w) d") + self.high.positions

    def _errors(self, predicted: Tensor, images: Tensor, hidden: Tensor) -> Tensor:
        """Mean square error over the hidden patches of each image, in float32."""
        target = to_patches(images, self.config.patch).float()
        if self.config.normalise:
            target = normalised(target)
        errors = (predicted.float() - target).square().mean(-1)
        return (errors * hidden).sum(1) / hidden.sum(1)

    def _hidden_above(self, hidden: Tensor) -> Tensor:
        """Return which patches of the large image are hidden."""
        scale, side = self.config.scale, self.config.side
        grid = hidden.unflatten(1, (side, side))
        return grid.repeat_interleave(scale, 1).repeat_interleave(scale, 2).flatten(1)


class MIRAMReconstruction(NamedTuple):
    """True images, what the encoder saw of them (0 elsewhere), and with the hidden part filled."""

    low: Tensor
    low_seen: Tensor
    low_filled: Tensor
    high: Tensor
    high_seen: Tensor
    high_filled: Tensor


class MIRAMEncoder(nn.Module):
    """A ViT on the kept patches and a class token, with fixed positions."""

    positions: Tensor

    def __init__(self, config: MIRAMConfig) -> None:
        super().__init__()
        self.patch = config.patch
        self.embed = nn.Linear(config.patch**2 * config.channels, config.dim)
        self.class_token = nn.Parameter(torch.zeros(1, 1, config.dim))
        grid = (config.side, config.side)
        self.register_buffer("positions", sincos_positions(grid, config.dim), persistent=False)
        self.blocks = nn.Sequential(
            *(
                TransformerBlock(config.dim, config.heads, config.mlp_ratio)
                for _ in range(config.depth)
            )
        )
        self.norm = nn.LayerNorm(config.dim)

    def forward(self, images: Tensor, kept: Tensor | None) -> Tensor:
        """Return tokens [B, 1 + kept, dim], the class token first; of all patches for None."""
        patches, places = to_patches(images, self.patch), self.positions.expand(len(images), -1, -1)
        if kept is not None:
            patches, places = take(patches, kept), take(places, kept)
        tokens = self.embed(patches) + places
        tokens = torch.cat([self.class_token.expand(len(tokens), -1, -1), tokens], 1)
        return self.norm(self.blocks(tokens))


class _Decoder(nn.Module):
    """A narrow transformer on all tokens of a grid, and a linear map to the pixels of a patch."""

    positions: Tensor

    def __init__(
        self, source: int, dim: int, depth: int, heads: int, side: int, out: int,
        config: MIRAMConfig, method: str, options: dict[str, Any], masked: bool,
    ) -> None:  # fmt: skip
        super().__init__()
        self.embed = nn.Linear(source, dim)
        self.mask_token = nn.Parameter(torch.zeros(dim)) if masked else None
        self.register_buffer("positions", sincos_positions((side, side), dim), persistent=False)
        self.blocks = nn.Sequential(
            *(
                TransformerBlock(dim, heads, config.mlp_ratio, method, **options)
                for _ in range(depth)
            )
        )
        self.norm = nn.LayerNorm(dim)
        self.predict = nn.Linear(dim, out)

    def read(self, tokens: Tensor, kept: Tensor) -> Tensor:
        """Return the class token and the tokens of the whole grid, with their positions."""
        embedded = self.embed(tokens)
        grid = self.fill(embedded[:, 1:], kept, len(self.positions))
        return torch.cat([embedded[:, :1], grid + self.positions], 1)

    def fill(self, tokens: Tensor, kept: Tensor, count: int) -> Tensor:
        """Return `count` tokens: those given at the kept places, mask tokens elsewhere."""
        return tokens if self.mask_token is None else put_back(tokens, kept, count, self.mask_token)

    def attend(self, tokens: Tensor) -> Tensor:
        """Return the tokens after all blocks."""
        return self.norm(self.blocks(tokens))


def shrink(images: Tensor, config: MIRAMConfig) -> Tensor:
    """Average images of the high resolution to the low one; leave others as they are."""
    if images.shape[-1] == config.image_size:
        return images
    return F.avg_pool2d(images, config.scale)


def _attention(config: MIRAMConfig) -> tuple[str, dict[str, Any]]:
    """Return the method of the high-resolution decoder's layers, and its options."""
    side = config.side * config.scale
    options: dict[str, dict[str, Any]] = {
        "softmax": {},
        "performer": {"features": config.features},
        "linformer": {"tokens": side**2, "num_landmarks": config.projected_keys},
        "nystrom": {"num_landmarks": config.landmarks, "grid": (side, side)},
    }
    method = config.high_method
    return "dense" if method == "softmax" else method, options[method]


def check_images(images: Tensor, config: MIRAMConfig, *, low_too: bool) -> None:
    """Refuse what are no images of the high resolution (or the low one)."""
    checks.require_tensor(_OP, "images", images)
    sides = [config.image_size * config.scale] + [config.image_size] * low_too
    expected = [[config.channels, side, side] for side in sides]
    if images.dim() != 4 or list(images.shape[1:]) not in expected:
        sizes = " or ".join(f"[B, {config.channels}, {side}, {side}]" for side in sides)
        raise ValueError(f"{_OP}: images {checks.describe(images)}; expected {sizes}")
