"""Attention to the key blocks of highest score: the public op and its checks."""

from __future__ import annotations

import math
from typing import Any, Literal, overload

import torch
from torch import Tensor

from sparseattn import checks
from sparseattn.ops import attention_checks, dispatch, sharded
from sparseattn.ops.block_scores import block_scores, has_weight
from sparseattn.ops.block_sparse_attention import Impl, block_sparse_attention, unsupported
from sparseattn.reference.topk_attention import topk_attention as reference
from sparseattn.structures import selection
from sparseattn.structures.block_lists import build_lists
from sparseattn.structures.block_mask import BlockMask, check_always, check_geometry, keep_count

_OP = "topk_attention"
_MODES = ("top_k", "top_p", "threshold")
_POOLINGS = ("mean", "max")
Mode = Literal["top_k", "top_p", "threshold"]
Pooling = Literal["mean", "max"]


@overload
def topk_attention(
    q: Tensor, k: Tensor, v: Tensor, keep: int | float | Tensor, *,
    block_size: int | tuple[int, int] = ..., mode: Mode = ..., pooling: Pooling = ...,
    always: Tensor | None = ..., query_mask: Tensor | None = ..., key_mask: Tensor | None = ...,
    query_weight: Tensor | None = ..., key_weight: Tensor | None = ...,
    gate: float | Tensor | None = ..., scale: float | None = ...,
    return_mask: Literal[False] = ..., impl: Impl = ...,
) -> Tensor: ...  # fmt: skip
@overload
def topk_attention(
    q: Tensor, k: Tensor, v: Tensor, keep: int | float | Tensor, *,
    block_size: int | tuple[int, int] = ..., mode: Mode = ..., pooling: Pooling = ...,
    always: Tensor | None = ..., query_mask: Tensor | None = ..., key_mask: Tensor | None = ...,
    query_weight: Tensor | None = ..., key_weight: Tensor | None = ...,
    gate: float | Tensor | None = ..., scale: float | None = ...,
    return_mask: Literal[True], impl: Impl = ...,
) -> tuple[Tensor, BlockMask]: ...  # fmt: skip


def topk_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keep: int | float | Tensor,
    *,
    block_size: int | tuple[int, int] = 64,
    mode: Mode = "top_k",
    pooling: Pooling = "mean",
    always: Tensor | None = None,
    query_mask: Tensor | None = None,
    key_mask: Tensor | None = None,
    query_weight: Tensor | None = None,
    key_weight: Tensor | None = None,
    gate: float | Tensor | None = None,
    scale: float | None = None,
    return_mask: bool = False,
    impl: Impl = "auto",
) -> Tensor | tuple[Tensor, BlockMask]:
    """Attend, in every query block, to the key blocks of highest pooled score.

        z_RC = scale * pool(q)_R . pool(k)_C                    one score per pair of blocks
        K_R  = the key blocks that row R of z keeps
        o_i  = sum_j softmax_j(scale * q_i . k_j + gate * z_RC) v_j,   keys j of blocks in K_R

    with i in query block R and j in key block C. Selection passes no gradient; with a gate, z is
    part of the logits and trains, with exact gradients, through the pooled queries and keys.

    Args:
        q: [B, H, Nq, D], float32, float16, bfloat16 or float64; any strides.
        k: [B, G, Nk, D], dtype of q; H is a multiple of G. Every query head selects for itself.
        v: [B, G, Nk, D], dtype of q.
        keep: how much of a row is kept. "top_k": a count of key blocks, a fraction of them in
            (0, 1], rounded up, or one count per row: an integer tensor [B or 1, H or 1, R].
            "top_p": the fewest blocks that hold this share, in (0, 1], of softmax(z_R).
            "threshold": the blocks whose share of softmax(z_R) is at least this, in (0, 1], and
            the best one. Equal scores go to the lowest block.
        block_size: tokens in a query block and in a key block, multiples of 16 up to 256. On a CPU
            (256, 64) is faster than 64, most of all in 16 bits.
        mode: "top_k", "top_p" or "threshold".
        pooling: how a block becomes one vector: "mean", or "max" of every column.
        always: bool, broadcastable to [B, H, R, C]: blocks kept besides, such as those of class
            tokens or of a window.
        query_mask: bool [B, Nq]; a query that is False is read as 0 and has no say in its block.
            It may hold NaN.
        key_mask: bool [B, Nk]; True = take part. A key that does not may hold NaN.
        query_weight: floating point [B, Nq], weights of the pooled queries, such as a saliency.
        key_weight: floating point [B, Nk], weights of the pooled keys. A token of weight 0 or less
            is not pooled; a key block without weight is kept by always alone.
        gate: a float, or a floating tensor of shape [] or [H], which gets a gradient.
        scale: multiplies q . k; default D ** -0.5.
        return_mask: also return the BlockMask that was chosen.
        impl: "triton" (NVIDIA GPU of capability 8.0 or newer; CPU under TRITON_INTERPRET=1),
            "torch" (any device), "reference" (naive, O(Nq * Nk) memory, differentiable twice), or
            "auto": triton on CUDA where it can run, else torch.

    Returns:
        o [B, H, Nq, D], dtype and memory layout of q; with return_mask also the BlockMask.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: an argument has the wrong shape, device or value.
        NotImplementedError: impl="triton" cannot run this; the message lists every reason.

    Notes:
        keep=1.0 without a gate is dense attention. A row keeps fewer than keep blocks where fewer
        have keys, and none where it has no queries; a query that sees nothing gets o = 0.
        Scores are float32 (float64 for float64 inputs), so paths that add in another order may
        choose otherwise between scores equal to rounding. Scores of NaN and infinities, which only
        such values in q and k make, rank as the lowest, or highest, finite ones.
        Deterministic: equal bits on every call, and a sample does not depend on the values of its
        batch mates. (The torch path on a GPU sums with atomics and is not.)
        DTensors sharded over batch and heads stay so, and nothing is sent between ranks; plain
        tensors beside them are the whole ones, equal on every rank. return_mask is not for them.
        Memory beyond block_sparse_attention: at most 13 * B * H * R * C bytes for scores, mask and
        lists, as much again for a gate and its gradient. No wait for the device. No gradient flows
        to keep, weights or masks. Differentiable once, except with impl="reference".

    Reference:
        VSA: Faster Video Diffusion with Trainable Sparse Attention (2025), arXiv:2505.13389: pooled
        blocks choose blocks. Here their scores enter the logits, not a second attention; formulas
        in docs/math/topk_attention.md.
    """
    if sharded.is_sharded(q, k, v):
        sharded.refuse(_OP, return_mask=return_mask)
        tensors = {
            "keep": keep, "always": always, "query_mask": query_mask, "key_mask": key_mask,
            "query_weight": query_weight, "key_weight": key_weight, "gate": gate,
        }  # fmt: skip
        options = {"block_size": block_size, "mode": mode, "pooling": pooling, "scale": scale}
        return _sharded((q, k, v), tensors, {**options, "impl": impl})
    q, k, v = attention_checks.check_qkv(_OP, q, k, v)
    scale = attention_checks.check_scale(_OP, scale, q)
    block = check_geometry(q.shape[2], k.shape[2], block_size, _OP)
    grid = torch.Size((*q.shape[:2], -(-q.shape[2] // block[0]), -(-k.shape[2] // block[1])))
    _check_choice(keep, mode, pooling, grid, q.device)
    check_always(_OP, always, grid, q.device, "q")
    gate = _check_gate(gate, q)
    _check_tokens(q, k, query_mask, key_mask, query_weight, key_weight)
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    weights = (_weights(query_mask, query_weight, wide), _weights(key_mask, key_weight, wide))
    if query_mask is not None:
        q = q.masked_fill(~query_mask[:, None, :, None], 0)
    asked = impl == "triton" or (impl == "auto" and q.device.type == "cuda")
    chosen: Any = dispatch.choose(_OP, impl, q.device, unsupported(q) if asked else [])
    choice: dict[str, Any] = {
        "keep": keep, "block_size": block, "mode": mode, "pooling": pooling, "always": always,
        "weights": weights, "gate": gate, "scale": scale,
    }  # fmt: skip
    if chosen == "reference":
        with torch.autocast(q.device.type, enabled=False):
            out, mask = reference(q, k, v, key_mask, **choice)
    else:
        mask, block_gate = choose(q, k, **choice, impl=chosen)
        out = block_sparse_attention(
            q, k, v, mask, key_mask=key_mask, block_gate=block_gate, scale=scale, impl=chosen
        )
    return (out, mask) if return_mask else out


def _sharded(
    qkv: tuple[Tensor, Tensor, Tensor], tensors: dict[str, Any], options: dict[str, Any]
) -> Tensor:
    """Attend on DTensors. A mask or gate gets the dimensions of batch and heads it lacks."""
    always, gate = tensors["always"], tensors["gate"]
    if isinstance(always, Tensor):
        tensors["always"] = always[(None,) * (4 - always.dim())]
    if isinstance(gate, Tensor):
        tensors["gate"] = gate.view(1, -1, 1)

    def run(q: Tensor, k: Tensor, v: Tensor, **local: Any) -> tuple[Tensor]:
        if isinstance(local["gate"], Tensor):
            local["gate"] = local["gate"].flatten()
        return (topk_attention(q, k, v, **local, **options),)

    return sharded.attend(_OP, run, qkv, tensors)[0]


def choose(
    q: Tensor,
    k: Tensor,
    keep: int | float | Tensor,
    block_size: tuple[int, int],
    mode: str,
    pooling: str,
    always: Tensor | None,
    weights: tuple[Tensor | None, Tensor | None],
    gate: Tensor | None,
    scale: float,
    impl: Impl,
) -> tuple[BlockMask, Tensor | None]:
    """Return the mask, and what the gate adds to the logits of a block."""
    geometry = (q.shape[2], k.shape[2], block_size)
    num_rows, num_columns = -(-q.shape[2] // block_size[0]), -(-k.shape[2] // block_size[1])
    plain = gate is None and weights == (None, None) and mode == "top_k"
    if plain and isinstance(keep, float) and keep == 1:
        everything = torch.ones((1, 1, num_rows, num_columns), dtype=torch.bool, device=q.device)
        return BlockMask.from_dense(everything, *geometry), None
    sources = (q.detach(), k.detach()) if gate is None else (q, k)
    scores = block_scores(*sources, weights, block_size, pooling, scale, impl)
    kept = _select(_ranked(scores.detach(), weights, block_size), keep, mode, always, impl)
    counted = mode == "top_k" and always is None and not isinstance(keep, Tensor)
    capacity = num_rows * (keep_count(keep, num_columns, _OP) if counted else num_columns)
    mask = BlockMask(*geometry, *build_lists(kept, capacity))
    return mask, None if gate is None else gate.to(scores.dtype) * scores


def _ranked(
    scores: Tensor, weights: tuple[Tensor | None, Tensor | None], block: tuple[int, int]
) -> Tensor:
    """Return finite scores, and -inf where a block has no queries or no keys to be scored."""
    ends = torch.finfo(scores.dtype)
    scores = scores.nan_to_num(nan=ends.min, posinf=ends.max, neginf=ends.min)
    for weight, size, shape in zip(weights, block, ((-1, 1), (1, -1)), strict=True):
        if weight is not None:
            present = has_weight(weight, size)
            present = present.view(present.shape[0], 1, *shape)
            scores = scores.masked_fill(~present, -math.inf)
    return scores


def _select(scores: Tensor, keep: Any, mode: str, always: Tensor | None, impl: Impl) -> Tensor:
    """Return which blocks are kept, bool [B, H, R, C]."""
    if mode == "top_k" and not isinstance(keep, Tensor):
        count = keep_count(keep, scores.shape[3], _OP)
        return selection.select_blocks(scores, count, always=always, impl=impl)
    weights = None
    if mode == "top_p":
        budgets, weights = selection.share_budgets(scores, keep)
    elif mode == "threshold":
        budgets = selection.threshold_budgets(scores, keep)
    else:
        budgets = keep.to(torch.int32)
    return selection.select_blocks(scores, 0, budgets, weights, always, impl)


def _weights(mask: Tensor | None, weight: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Return the pooling weights of tokens, 0 for those that are hidden or weigh no more."""
    if weight is None:
        return None if mask is None else mask.to(dtype)
    used = weight > 0 if mask is None else mask & (weight > 0)
    return torch.where(used, weight.detach().to(dtype), 0)


def _check_choice(
    keep: Any, mode: Any, pooling: Any, grid: torch.Size, device: torch.device
) -> None:
    for name, value, known in (("mode", mode, _MODES), ("pooling", pooling, _POOLINGS)):
        if value not in known:
            options = ", ".join(repr(option) for option in known)
            raise ValueError(f"{_OP}: {name} is {value!r}; expected one of {options}")
    if mode != "top_k":
        rule = "a float in (0, 1]"
        if isinstance(keep, bool) or not isinstance(keep, (int, float)):
            raise TypeError(f"{_OP}: keep {checks.describe(keep)}; expected {rule}")
        if not 0 < keep <= 1:
            raise ValueError(f"{_OP}: keep is {keep}; expected {rule}")
    elif isinstance(keep, Tensor):
        shapes = checks.Shapes(_OP)
        for name, size in zip("BHR", grid, strict=False):
            shapes.set(name, size, "q")
        shapes.bind("keep", keep, "1|B 1|H R")
        checks.require_dtype(_OP, "keep", keep, torch.int32, torch.int64)
        checks.require_device(_OP, "keep", keep, device, "q")
    else:
        keep_count(keep, grid[3], _OP)


def _check_gate(gate: Any, q: Tensor) -> Tensor | None:
    """Check the gate; return it as [1 or H, 1, 1]."""
    if gate is None:
        return None
    heads = q.shape[1]
    if isinstance(gate, Tensor):
        checks.require_floating(_OP, "gate", gate)
        checks.require_device(_OP, "gate", gate, q.device, "q")
        if gate.dim() > 1 or gate.numel() not in (1, heads):
            raise ValueError(
                f"{_OP}: gate {checks.describe(gate)}; expected [] or [H], H={heads} (from q)"
            )
        return gate.view(-1, 1, 1)
    if isinstance(gate, bool) or not isinstance(gate, (int, float)):
        raise TypeError(f"{_OP}: gate {checks.describe(gate)}; expected a float, a tensor or None")
    if not math.isfinite(gate):
        raise ValueError(f"{_OP}: gate is {gate}; expected a finite float")
    return torch.full((1, 1, 1), float(gate), dtype=torch.float64, device=q.device)


def _check_tokens(
    q: Tensor, k: Tensor, query_mask: Any, key_mask: Any, query_weight: Any, key_weight: Any
) -> None:
    shapes = checks.Shapes(_OP)
    shapes.bind("q", q, "B H Nq D")
    shapes.bind("k", k, "B G Nk D")
    masks = (("query_mask", query_mask, "B Nq"), ("key_mask", key_mask, "B Nk"))
    weights = (("query_weight", query_weight, "B Nq"), ("key_weight", key_weight, "B Nk"))
    for name, tensor, pattern in (*masks, *weights):
        if tensor is None:
            continue
        shapes.bind(name, tensor, pattern)
        checks.require_device(_OP, name, tensor, q.device, "q")
        if name.endswith("mask"):
            checks.require_dtype(_OP, name, tensor, torch.bool)
        else:
            checks.require_floating(_OP, name, tensor)
