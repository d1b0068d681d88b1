"""The demo's saliency panel: a predictor learns which patches of the picture are attended to."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

import torch
from torch import Tensor, nn

from sparseattn import block_sparse_attention, saliency_attention
from sparseattn.cli import demo_vit as vit
from sparseattn.cli.demo_measure import relative_error

STEPS, HIDDEN, RATE = 60, 64, 1e-2


@dataclass(frozen=True, eq=False)
class SaliencyPanel:
    """What the predictor found.

    kept  bool [G, G] patches that are kept     saliency  [1, N] in tile order
    share  of the patches that are kept         mass  of the attention weights that they receive
    best  the most that so many could receive   error  of the output, relative to dense
    parameters  of the predictor
    """

    kept: Tensor
    saliency: Tensor
    share: float
    mass: float
    best: float
    error: float
    parameters: int

    def summary(self) -> str:
        """Say it in one sentence."""
        return (
            f"a predictor with {self.parameters} parameters, after {STEPS} steps on this picture, "
            f"keeps {self.share:.1%} of the patches; they receive {self.mass:.1%} of the attention "
            f"({self.share:.1%} by chance, {self.best:.1%} at best); error of output "
            f"{self.error:.3f}"
        )


def attention_received(qkv: Sequence[Tensor], block: int) -> Tensor:
    """Return which share of all dense attention weights each key receives, [N].

    The gradient of lse_i to a bias of key j is the weight of j, so one backward sums them all.
    """
    q, k, v = qkv
    bias = torch.zeros(1, 1, q.shape[2], device=q.device, requires_grad=True)
    mask = vit.all_tiles(q, block)
    _, lse = block_sparse_attention(q, k, v, mask, key_bias=bias, return_lse=True)
    (received,) = torch.autograd.grad(lse.sum(), bias)
    return received[0, 0] / received.sum()


def learned_saliency(tokens: Tensor, received: Tensor, seed: int) -> tuple[Tensor, int]:
    """Teach a predictor what tokens [1, N, EMBED] receive; return its saliency [1, N], and size."""
    predictor = nn.Sequential(nn.Linear(vit.EMBED, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, 1))
    generator = torch.Generator().manual_seed(seed)
    for weights in predictor.parameters():
        if weights.dim() == 2:
            nn.init.normal_(weights, std=weights.shape[1] ** -0.5, generator=generator)
        else:
            nn.init.zeros_(weights)
    predictor.to(tokens.device)
    optimizer = torch.optim.Adam(predictor.parameters(), RATE)
    for _ in range(STEPS):
        loss = -(received * predictor(tokens)[0, :, 0].log_softmax(0)).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        saliency = predictor(tokens)[..., 0].sigmoid()
    return saliency, sum(weights.numel() for weights in predictor.parameters())


def saliency_panel(
    tokens: Tensor, qkv: Sequence[Tensor], keep: float, block: int, seed: int
) -> SaliencyPanel:
    """Learn on the first block's tokens [1, N, EMBED] and attention, then keep the best tokens."""
    q, k, v = qkv
    received = attention_received(qkv, block)
    saliency, parameters = learned_saliency(tokens, received, seed)
    with torch.no_grad():
        out, kept = saliency_attention(q, k, v, saliency, keep, return_indices=True)
        error = relative_error([out], [vit.dense_attention(q, k, v)])
    places = kept[0, 0].long()
    chosen = torch.zeros_like(received, dtype=torch.bool)
    chosen[places] = True
    best = received.topk(ceil(keep * len(received))).values.sum()
    return SaliencyPanel(
        kept=vit.to_picture_grid(chosen.cpu(), block),
        saliency=saliency,
        share=len(places) / len(received),
        mass=float(received[places].sum()),
        best=float(best),
        error=error,
        parameters=parameters,
    )
