"""A whole ViT-S/16 that drops tokens, against the dense one: attention, MLPs and all gradients.

Behind the third block only the most salient tokens go on, and at the end they are put back among
the others: attention and MLPs of nine blocks see `keep` of the tokens. The saliency is random and
gets its gradient; the predictor that would make it, less than 1 % of the work, is left out. Density
is the share of the dense network's operations, so 1 / density is the gain that counting predicts.
All weights are one flat tensor, an input like the others; its length says how many blocks there
are. The gate judges four blocks, with as many tokens as are timed: float64 of twelve takes minutes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from sparseattn import saliency_attention
from sparseattn.benchmarks.registry import Benchmark, Case, Problem, Provider, Work

EMBED, HEADS, PATCH, MLP = 384, 6, 16, 4
DENSE_BLOCKS = 3  # in front of the choice
JUDGED_BLOCKS = 4
SLICE = 128  # queries

# (q, k, v, saliency of the keys) -> o
Attend = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


SHAPES = [  # the weights of a block; of linear maps the last column is the bias
    (2, EMBED),
    (3 * EMBED, EMBED),  # none here: the gradient of a key's bias is 0, which no sum shows
    (EMBED, EMBED + 1),
    (2, EMBED),
    (MLP * EMBED, EMBED + 1),
    (EMBED, MLP * EMBED + 1),
]
EMBEDDING = (EMBED, 3 * PATCH**2 + 1)


def build(case: Case) -> Problem:
    """Make a picture, a saliency, all weights, and those who run the network."""
    random, depth = case.generator(), case["depth"]
    batch, side = case["batch"], case["size"] // PATCH
    tokens = side**2
    count = math.ceil(case.share("keep") * tokens)
    shape = (batch, 3, case["size"], case["size"])
    picture = torch.randn(shape, generator=random, device=case.device)
    saliency = 1 - torch.rand((batch, tokens), generator=random, device=case.device)
    weights = torch.cat([w.flatten() for w in drawn(depth, random, case.device)])
    inputs = tuple(x.to(case.dtype).requires_grad_() for x in (picture, saliency, weights))
    judged = inputs[2].detach()[: num_weights(min(depth, JUDGED_BLOCKS))].clone().requires_grad_()
    moved = float(sum(x.numel() * x.element_size() for x in inputs))
    dense = vit_flops(batch, [tokens] * depth)
    trimmed = vit_flops(batch, [tokens] * DENSE_BLOCKS + [count] * (depth - DENSE_BLOCKS))

    def checked(attend: Attend | None) -> Callable[..., Tensor]:
        def reference(rows: Tensor, *inputs: Tensor) -> Tensor:
            behind = None if attend is None else in_slices(attend)
            return vit(inputs, count, behind, in_slices(naive))[:, rows]

        return reference

    def provider(name: str, attend: Attend | None, **options: Any) -> Provider:
        def call(*inputs: Tensor) -> Tensor:
            return vit(inputs, count, attend, sdpa)

        return Provider(name, call, **options)

    return Problem(
        inputs=inputs,
        providers=(
            provider("sparseattn", saliency_of_all, ours=True),
            provider("gather-sdpa", biased_sdpa),
            provider("dense", None, dense=True, reference=checked(None)),
        ),
        reference=checked(biased_naive),
        work=Work(trimmed, moved, 2 * trimmed, 2 * moved, dense),
        density=trimmed / dense,
        judged=(*inputs[:2], judged),
    )


def drawn(depth: int, random: torch.Generator, device: torch.device) -> Iterator[Tensor]:
    """Yield the weights of the embedding and of all blocks, with norms of scale 1 and bias 0."""

    def normal(shape: tuple[int, int]) -> Tensor:
        return torch.randn(shape, generator=random, device=device) * shape[1] ** -0.5

    yield normal(EMBEDDING)
    for _ in range(depth):
        for shape in SHAPES:
            if shape == SHAPES[0]:
                yield torch.tensor([[1.0], [0.0]], device=device).expand(shape)
            else:
                yield normal(shape)


def num_weights(depth: int) -> int:
    """Count the weights of the embedding and of `depth` blocks."""
    return math.prod(EMBEDDING) + depth * sum(map(math.prod, SHAPES))


def vit(
    inputs: tuple[Tensor, ...],
    count: int,
    attend: Attend | None,
    attend_first: Attend,
) -> Tensor:
    """Run the network; the tokens [B, N, EMBED] behind the last block.

    inputs: picture, saliency and weights. attend: of the blocks that see `count` tokens; None drops
    none. attend_first: of the others.
    """
    picture, saliency, weights = inputs
    depth = (len(weights) - num_weights(0)) // (num_weights(1) - num_weights(0))
    shapes = [EMBEDDING, *SHAPES * depth]
    parts = weights.split([math.prod(shape) for shape in shapes])
    embedding, *rest = (part.view(shape) for part, shape in zip(parts, shapes, strict=True))
    blocks = [rest[i : i + len(SHAPES)] for i in range(0, len(rest), len(SHAPES))]
    patches = rearrange(picture, "b c (y p) (x q) -> b (y x) (c p q)", p=PATCH, q=PATCH)
    x = linear(patches, embedding)
    for own in blocks[:DENSE_BLOCKS]:
        x = block(x, saliency, own, attend_first)
    if attend is None:
        x = x + 0 * saliency.sum()  # not read, but differentiated as in the others
        for own in blocks[DENSE_BLOCKS:]:
            x = block(x, saliency, own, attend_first)
        return x
    place = saliency.detach().topk(count).indices.sort().values
    spread = place[..., None].expand(-1, -1, EMBED)
    kept, kept_saliency = x.gather(1, spread), saliency.gather(1, place)
    for own in blocks[DENSE_BLOCKS:]:
        kept = block(kept, kept_saliency, own, attend)
    return x.scatter(1, spread, kept)


def block(x: Tensor, saliency: Tensor, weights: list[Tensor], attend: Attend) -> Tensor:
    """One pre-norm block."""
    norm1, project, out, norm2, up, down = weights
    qkv = F.linear(norm(x, norm1), project)
    q, k, v = rearrange(qkv, "b n (three h d) -> three b h n d", three=3, h=HEADS)
    x = x + linear(rearrange(attend(q, k, v, saliency), "b h n d -> b n (h d)"), out)
    return x + linear(F.gelu(linear(norm(x, norm2), up)), down)


def in_slices(attend: Attend) -> Attend:
    """Give the same for some queries at a time, computed again in the backward: little memory."""

    def run(q: Tensor, k: Tensor, v: Tensor, saliency: Tensor) -> Tensor:
        parts = q.split(SLICE, dim=2)
        made = [checkpoint(attend, part, k, v, saliency, use_reentrant=False) for part in parts]
        return torch.cat(made, dim=2)

    return run


def linear(x: Tensor, weights: Tensor) -> Tensor:
    """Apply a linear map whose last column is the bias."""
    return F.linear(x, weights[:, :-1], weights[:, -1])


def norm(x: Tensor, weights: Tensor) -> Tensor:
    """Apply layer norm; the rows of the weights are scale and bias."""
    return F.layer_norm(x, (EMBED,), weights[0], weights[1])


def saliency_of_all(q: Tensor, k: Tensor, v: Tensor, saliency: Tensor) -> Tensor:
    """Attend to all tokens there are, by our op."""
    return saliency_attention(q, k, v, saliency, 1.0)


def biased_sdpa(q: Tensor, k: Tensor, v: Tensor, saliency: Tensor) -> Tensor:
    """Attend to all tokens there are, with log saliency on the logits, by torch."""
    bias = saliency.log()[:, None, None].expand(-1, 1, q.shape[2], -1)
    return F.scaled_dot_product_attention(q, k, v, bias)


def sdpa(q: Tensor, k: Tensor, v: Tensor, saliency: Tensor) -> Tensor:
    """Attend to all tokens, by torch."""
    return F.scaled_dot_product_attention(q, k, v)


def biased_naive(q: Tensor, k: Tensor, v: Tensor, saliency: Tensor) -> Tensor:
    """Attend with log saliency on the logits, by its formula."""
    return (q @ k.mT * q.shape[-1] ** -0.5 + saliency.log()[:, None, None]).softmax(-1) @ v


def naive(q: Tensor, k: Tensor, v: Tensor, saliency: Tensor) -> Tensor:
    """Attend by the formula."""
    return (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v


def vit_flops(batch: int, tokens: list[int]) -> float:
    """Count operations forward, of blocks that see so many tokens: weights, then attention."""
    of_blocks = ((4 + 2 * MLP) * n * EMBED**2 + 2 * n**2 * EMBED for n in tokens)
    return 2.0 * batch * sum(of_blocks)


BENCHMARK = Benchmark(
    op="vit_trim_tokens",
    build=build,
    axes={"batch": (1,), "size": (1024,), "depth": (12,), "keep": (0.5,)},
    cuda_axes={"batch": (8,)},
    small={"size": (128,), "depth": (4,)},
)
