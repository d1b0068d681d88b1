"""SparseAttnNet: a coarse map chooses a few pixels, and attention sees those alone.

Reference model that follows the published description; the paper leaves much open, and
``SparseAttnNet`` says what was chosen here.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn

from sparseattn import checks
from sparseattn.layers.sparse_attention import SparseAttention
from sparseattn.ops.token_selection import select_tokens

_OP = "SparseAttnNet"
_TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class SparseAttnNetConfig:
    """What the paper leaves open, each with the choice made here.

    classes, channels  what is told apart, and the channels of a pixel
    dim, heads, depth  width of the tokens, heads of attention, and blocks
    mlp_ratio          hidden width of a block's MLP, in units of dim
    coarse_width       channels of the coarse net's first layer; its second has twice as many
    embed_width        hidden width of the embedding that all pixels share
    frequencies        octaves of sines and cosines of x and y that the embedding sees beside x and
                       y themselves, the longest twice as long as the image; 0: none of them
    keep               share of the pixels that is seen, at the start
    explore            share of the seen pixels that is drawn at random, in training, at its start;
                       it falls to 0 until the rule below is frozen, so that what the model sees
                       at last is what it will see in use
    gradient           how the task's gradient reaches the coarse map: "gate" multiplies a pixel's
                       embedding by its value in the map, "bias" adds the log of that value to the
                       logits of attention, "none" leaves the map to distillation
    distill            weight of the distillation loss; 0 turns it off
    distill_from       fine attention is that of the class token in the "last" block, or the "mean"
                       of all blocks
    rule_...           the rule by which k changes: see `KeepRule`
    """

    classes: int = 10
    channels: int = 1
    dim: int = 64
    heads: int = 4
    depth: int = 2
    mlp_ratio: float = 2.0
    coarse_width: int = 16
    embed_width: int = 64
    frequencies: int = 3
    keep: float = 0.5
    explore: float = 0.1
    gradient: Literal["gate", "bias", "none"] = "bias"
    distill: float = 0.1
    distill_from: Literal["last", "mean"] = "last"
    rule_low: float = 0.15
    rule_high: float = 0.5
    rule_factor: float = 0.85
    rule_every: int = 2
    rule_window: int = 4
    rule_tolerance: float = 0.02
    rule_smoothing: float = 0.5
    rule_freeze: float = 0.2

    def __post_init__(self) -> None:
        for name in ("classes", "channels", "dim", "heads", "depth", "coarse_width", "embed_width"):
            checks.require_int(_OP, name, getattr(self, name), low=1)
        checks.require_int(_OP, "frequencies", self.frequencies, low=0)
        if self.dim % self.heads:
            raise ValueError(
                f"{_OP}: dim is {self.dim}; expected a multiple of heads, heads={self.heads}"
            )
        if not 0 < self.keep <= 1:
            raise ValueError(f"{_OP}: keep is {self.keep}; expected a share in (0, 1]")
        if not 0 <= self.explore < 1:
            raise ValueError(f"{_OP}: explore is {self.explore}; expected a share in [0, 1)")
        if self.gradient not in ("gate", "bias", "none"):
            raise ValueError(f"{_OP}: gradient is {self.gradient!r}; expected gate, bias or none")
        if self.distill_from not in ("last", "mean"):
            raise ValueError(f"{_OP}: distill_from is {self.distill_from!r}; expected last or mean")


class SparseAttnNetOutput(NamedTuple):
    """What the model returns. The losses are None without labels.

    loss     task_loss + distill * distill_loss     logits  [B, classes]
    coarse   [B, H, W] in (0, 1)                    chosen  int [B, k], ascending, row by row
    """

    loss: Tensor | None
    logits: Tensor
    coarse: Tensor
    chosen: Tensor
    task_loss: Tensor | None
    distill_loss: Tensor | None


class SparseAttnNet(
    nn.Module,
    PyTorchModelHubMixin,
    library_name="sparseattn",
    tags=["sparse-attention", "image-classification"],
):
    """Classify an image from its few most salient pixels.

    ::

        a = sigmoid(conv(image))                     one value a pixel: the coarse map
        S = the k pixels of highest a                ties to the lowest index
        e_i = mlp(x_i, y_i, v_i), i in S             one MLP for all pixels; x and y in [-1, 1],
                                                     and sin and cos of 2^f pi x / 2 and of y
        t = blocks([e_1 .. e_k, class token])        multi-head attention over k + 1 tokens, with
                                                     log a_i added to the logits of pixel i
        loss = CE(head(t_class), label) + distill * KL(f || a_S / sum a_S)

    f is the attention of the class token to the pixels, averaged over heads, without gradient:
    the map learns from what later layers looked at. ``keep`` is the share of the pixels that is
    seen (k = keep * H * W, rounded, at least 1); it is an attribute, saved with the weights, that
    ``KeepRule`` lowers in training. Any H and W work.

    Choices. The paper's method could be read in a review only, so all of these are ours, and
    options of ``SparseAttnNetConfig`` where a name is given:

    - image size: any; the map has the size of the image;
    - the coarse net: two 3 x 3 convolutions with ReLU (coarse_width), then one to one channel;
    - the embedding (embed_width): without sines and cosines of the place (frequencies) a narrow
      MLP blurs neighbouring pixels, and digits were told apart less well;
    - width, heads and depth (dim, heads, depth, mlp_ratio); pre-norm
      blocks, GELU. In the last block only the class token asks: nothing reads the others;
    - the way of the gradient into the map (gradient): top-k has none of its own. On digits "bias"
      learned where to look; behind the norm of a block little is left of what "gate" multiplies;
    - the distillation loss: KL over the chosen pixels, from the last block or all (distill,
      distill_from);
    - exploration (explore): without it a pixel that is left out early is never tried again;
    - the rule of k: ``KeepRule``. k is the same for all images of a batch.

    Deterministic in eval; in training, exploration draws from torch's generator.

    Reference: "SparseAttnNet", 2025, arXiv 2505.07661.
    """

    def __init__(self, config: SparseAttnNetConfig | None = None) -> None:
        super().__init__()
        config = SparseAttnNetConfig() if config is None else config
        self.config = config
        self.keep, self.explore = config.keep, config.explore
        dim, width = config.dim, config.coarse_width
        self.coarse = nn.Sequential(
            nn.Conv2d(config.channels, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, 2 * width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(2 * width, 1, 3, padding=1),
        )
        self.embed = nn.Sequential(
            nn.Linear(2 + 4 * config.frequencies + config.channels, config.embed_width),
            nn.GELU(),
            nn.Linear(config.embed_width, dim),
        )
        self.class_token = nn.Parameter(torch.randn(1, 1, dim) * 0.02)
        self.blocks = nn.ModuleList(_Block(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, config.classes)

    def forward(self, images: Tensor, labels: Tensor | None = None) -> SparseAttnNetOutput:
        """Classify images [B, channels, H, W]; with labels int [B], the losses too."""
        checks.require_tensor(_OP, "images", images)
        if images.dim() != 4 or images.shape[1] != self.config.channels:
            raise ValueError(
                f"{_OP}: images {checks.describe(images)}; "
                f"expected [B, {self.config.channels}, H, W]"
            )
        coarse = self.coarse(images).float().sigmoid()  # [B, 1, H, W]
        chosen = self._choose(coarse.flatten(2))  # [B, k]
        weight = coarse.flatten(1).gather(1, chosen)
        tokens = self._embed(images, chosen)
        if self.config.gradient == "gate":
            tokens = tokens * weight[..., None].to(tokens.dtype)
        tokens = torch.cat([tokens, self.class_token.expand(len(tokens), -1, -1)], 1)
        saliency = None
        if self.config.gradient == "bias":
            saliency = F.pad(weight.clamp_min(_TINY), (0, 1), value=1.0)
        attention = []
        for block in self.blocks:
            tokens, fine = block(tokens, saliency, only_class=block is self.blocks[-1])
            attention.append(fine)
        logits = self.head(self.norm(tokens[:, -1]))
        task = distill = loss = None
        if labels is not None:
            task = F.cross_entropy(logits.float(), labels)
            distill = self._distillation(attention, weight)
            loss = task + self.config.distill * distill
        return SparseAttnNetOutput(loss, logits, coarse[:, 0], chosen, task, distill)

    def _choose(self, coarse: Tensor) -> Tensor:
        """Return the pixels to see, [B, k], of a map [B, 1, N]."""
        batch, _, pixels = coarse.shape
        count = max(1, round(self.keep * pixels))
        forced = None
        explored = round(self.explore * count) if self.training else 0
        if explored:
            drawn = torch.rand(batch, pixels, device=coarse.device).topk(explored).indices
            forced = torch.zeros(batch, pixels, dtype=torch.bool, device=coarse.device)
            forced.scatter_(1, drawn, True)
        # a sigmoid that underflows is still a pixel that can be chosen, and so is one that is NaN
        rank = coarse.detach().clamp_min(_TINY).nan_to_num(_TINY)
        chosen = select_tokens(rank, count, forced=forced)
        return chosen.tokens[:, 0].long()

    def _embed(self, images: Tensor, chosen: Tensor) -> Tensor:
        """Return the embedding [B, k, dim] of the chosen pixels: place and value."""
        height, width = images.shape[2:]
        values = images.flatten(2).mT.gather(1, chosen[..., None].expand(-1, -1, images.shape[1]))
        y = (chosen // width) * (2 / max(1, height - 1)) - 1
        x = (chosen % width) * (2 / max(1, width - 1)) - 1
        places = torch.stack([x, y], -1)
        angles = [math.pi / 2 * 2**octave * places for octave in range(self.config.frequencies)]
        waves = [wave for angle in angles for wave in (angle.sin(), angle.cos())]
        return self.embed(torch.cat([torch.cat([places, *waves], -1).to(values.dtype), values], -1))

    def _distillation(self, attention: list[Tensor], weight: Tensor) -> Tensor:
        """Return KL(fine || coarse) over the chosen pixels, averaged over the batch."""
        used = attention if self.config.distill_from == "mean" else attention[-1:]
        fine = torch.stack(used).mean(0).detach().float()
        fine = fine / fine.sum(1, keepdim=True).clamp_min(_TINY)
        log_weight = weight.clamp_min(_TINY).log()
        coarse = log_weight - log_weight.logsumexp(1, keepdim=True)
        return F.kl_div(coarse, fine, reduction="batchmean")

    def get_extra_state(self) -> Tensor:
        """Return the shares of pixels that are seen and explored, for the state_dict."""
        return torch.tensor([self.keep, self.explore], dtype=torch.float64)

    def set_extra_state(self, state: Tensor) -> None:
        """Take the shares from a state_dict."""
        self.keep, self.explore = state.tolist()


class _Block(nn.Module):
    """Pre-norm attention and MLP; also the attention of the class token, the last one."""

    def __init__(self, config: SparseAttnNetConfig) -> None:
        super().__init__()
        dim, hidden = config.dim, round(config.dim * config.mlp_ratio)
        options: dict[str, Any] = {"method": "dense"}
        if config.gradient == "bias":
            options = {"method": "saliency", "keep": 1.0}
        self.attention_norm = nn.LayerNorm(dim)
        self.attention = SparseAttention(dim, config.heads, batch_first=True, **options)
        self.mlp_norm = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))

    def forward(
        self, tokens: Tensor, saliency: Tensor | None, only_class: bool
    ) -> tuple[Tensor, Tensor]:
        """Return the tokens (or the class token alone), and its attention to the pixels [B, k]."""
        seen = self.attention_norm(tokens)
        given = {} if saliency is None else {"saliency": saliency}
        asked, weights = self.attention(seen[:, -1:], seen, seen, need_weights=True, **given)
        if not only_class:
            asked, _ = self.attention(seen, seen, seen, **given)
        tokens = (tokens[:, -1:] if only_class else tokens) + asked
        return tokens + self.mlp(self.mlp_norm(tokens)), weights[:, 0, :-1]
