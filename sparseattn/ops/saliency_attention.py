"""Attention to the most salient tokens: the public op, its checks and its dispatch."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, overload

import torch
from torch import Tensor

from sparseattn import checks
from sparseattn.ops import attention_checks as attention
from sparseattn.ops import block_sparse_attention_registration as engine
from sparseattn.ops import dispatch, sharded, token_gather
from sparseattn.ops.block_sparse_attention import unsupported
from sparseattn.ops.token_selection import TokenSelection, keep_capacity, select_tokens
from sparseattn.reference.saliency_attention import saliency_attention as reference
from sparseattn.structures.block_lists import BlockLists
from sparseattn.structures.block_mask import BlockMask

_OP = "saliency_attention"
_BLOCK = 128  # of the mask that shows every kept key; kernels cut it into their tiles
Impl = Literal["auto", "triton", "torch", "reference"]


@overload
def saliency_attention(
    q: Tensor, k: Tensor, v: Tensor, saliency: Tensor, keep: int | float, *,
    key_mask: Tensor | None = ..., always: int | Tensor = ..., threshold: float | None = ...,
    log_bias: bool = ..., scale: float | None = ..., prune_queries: bool = ...,
    passthrough: Tensor | None = ..., return_indices: Literal[False] = ..., impl: Impl = ...,
) -> Tensor: ...  # fmt: skip
@overload
def saliency_attention(
    q: Tensor, k: Tensor, v: Tensor, saliency: Tensor, keep: int | float, *,
    key_mask: Tensor | None = ..., always: int | Tensor = ..., threshold: float | None = ...,
    log_bias: bool = ..., scale: float | None = ..., prune_queries: bool = ...,
    passthrough: Tensor | None = ..., return_indices: Literal[True], impl: Impl = ...,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


def saliency_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    saliency: Tensor,
    keep: int | float,
    *,
    key_mask: Tensor | None = None,
    always: int | Tensor = 0,
    threshold: float | None = None,
    log_bias: bool = True,
    scale: float | None = None,
    prune_queries: bool = False,
    passthrough: Tensor | None = None,
    return_indices: bool = False,
    impl: Impl = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Attend to the `keep` most salient tokens only, their saliency being part of the softmax.

        w_ij = s_j * exp(scale * q_i . k_j),   o_i = sum_j w_ij v_j / sum_j w_ij

    with j over the kept tokens and s_j their saliency, which is a bias of log s_j on the logits.
    Gradients are exact for q, k, v and saliency; the choice of the tokens has none.

    Args:
        q: [B, H, Nq, D], float32, float16, bfloat16 or float64; any strides.
        k: [B, G, Nk, D], dtype of q; H is a multiple of G (grouped queries).
        v: [B, G, Nk, D], dtype of q.
        saliency: floating point [B, Nk], or [B, G, Nk] for a choice of its own in each key head
            (query heads that share a key head share its tokens); in (0, 1]. A token at 0 or below,
            or NaN, is never kept.
        keep: how many tokens a sample keeps at most; or a fraction in (0, 1] of the tokens that
            key_mask shows, rounded up. Ties go to the lowest index.
        key_mask: bool [B, Nk]; True = take part. A token that does not may hold NaN, here and in
            saliency.
        always: tokens that are kept before all others and count towards `keep`: the first so many
            (class and register tokens) or all where there are fewer, or those of a bool [Nk] or
            [B or 1, Nk]. Their saliency is not read and stands at 1.
        threshold: tokens of less saliency are dropped as well, so that `keep` is the most there
            can be.
        log_bias: with False the saliency chooses the tokens and does nothing else.
        scale: multiplies q . k; default D ** -0.5.
        prune_queries: dropped tokens ask nothing either (Nq = Nk): their rows of o are 0.
        passthrough: [B, H, Nq, D], dtype of q: with prune_queries, what the rows of dropped tokens
            are instead of 0.
        return_indices: also return which tokens were kept.
        impl: "triton" (NVIDIA GPU of capability 8.0 or newer; CPU under TRITON_INTERPRET=1),
            "torch" (any device), "reference" (naive, O(Nq * Nk) memory), or "auto": triton on CUDA
            where it can run, else torch.

    Returns:
        o [B, H, Nq, D], dtype and memory layout of q; with return_indices also the kept tokens,
        int32 [B, 1 or G, K], ascending, -1 in places left over. K depends on `keep` and Nk alone.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: an argument has the wrong shape, device or value.
        NotImplementedError: impl="triton" cannot run this; the message lists every reason.

    Notes:
        Where a sample keeps no token, o = 0 with zero gradients.
        Deterministic: equal bits on every call, and a sample does not depend on the values of its
        batch mates. (The torch path on a GPU sums with atomics and is not.)
        Under autocast q, k, v and passthrough are cast as scaled_dot_product_attention casts them.
        DTensors sharded over batch and heads stay so, and nothing is sent between ranks; plain
        tensors beside them are the whole ones, equal on every rank. return_indices is not for them.
        Time is O(Nq * K), with prune_queries O(K * K), and a sort of the saliency. Memory beyond
        the outputs: the kept keys and values, 2 * B * G * K * D elements, and 4 * B * H * Nq bytes;
        backward needs as much again. No gradient flows to the choice, to forced tokens' saliency or
        to key_mask. Differentiable once, except with impl="reference".

    Reference:
        DynamicViT: Efficient Vision Transformers with Dynamic Token Sparsification (2021),
        arXiv:2106.02034, attention masking: the policy inside the softmax, with s_j for its 0 or 1.
    """
    if sharded.is_sharded(q, k, v):
        sharded.refuse(_OP, return_indices=return_indices)
        tensors = {
            "saliency": saliency, "key_mask": key_mask, "passthrough": passthrough,
            "always": always[None] if isinstance(always, Tensor) and always.dim() == 1 else always,
        }  # fmt: skip
        run: Callable[..., Any] = partial(
            saliency_attention, keep=keep, threshold=threshold, log_bias=log_bias, scale=scale,
            prune_queries=prune_queries, impl=impl,
        )  # fmt: skip
        return sharded.attend(_OP, lambda *a, **b: (run(*a, **b),), (q, k, v), tensors)[0]
    q, k, v = attention.check_qkv(_OP, q, k, v)
    scale = attention.check_scale(_OP, scale, q)
    per_head = _check_saliency(saliency, q, k)
    share = checks.keep_share(_OP, keep)
    _check_mask(key_mask, q, k)
    forced = _check_always(always, share, q, k)
    passthrough = _check_pruning(prune_queries, passthrough, q, k)
    _check_threshold(threshold)
    checks.require_bool(_OP, "log_bias", log_bias)
    asked = impl == "triton" or (impl == "auto" and q.device.type == "cuda")
    chosen = dispatch.choose(_OP, impl, q.device, unsupported(q) if asked else [])
    if chosen == "reference":
        with torch.autocast(q.device.type, enabled=False):
            out, _ = reference(
                q, k, v, per_head, share, key_mask, forced, threshold, log_bias, scale,
                prune_queries, passthrough,
            )  # fmt: skip
    selection = select_tokens(per_head, share, key_mask, forced, threshold)
    if chosen != "reference":
        bias = _key_bias(per_head, selection, forced, log_bias, engine.wide_dtype(q.dtype))
        out = _attend(q, k, v, bias, selection, scale, prune_queries, passthrough, chosen)
    return (out, selection.tokens) if return_indices else out


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    selection: TokenSelection,
    scale: float,
    prune_queries: bool,
    passthrough: Tensor | None,
    impl: str,
) -> Tensor:
    """Gather the kept tokens, let the engine attend to all of them, put queries back."""
    kept_k, kept_v, kept_bias = token_gather.gather_keys(k, v, bias, selection, impl)
    if kept_bias.shape[1] > 1:  # of key heads; the engine takes one, or one for each query head
        kept_bias = kept_bias.repeat_interleave(q.shape[1] // k.shape[1], 1)
    if prune_queries:
        q = token_gather.gather_tokens(q, selection, impl)
    mask = _everything(q.shape[2], kept_k.shape[2], q.device)
    out, _ = engine.apply(q, kept_k, kept_v, kept_bias, None, mask, scale, impl)
    if prune_queries:
        out = token_gather.scatter_tokens(out, selection, passthrough, impl)
    return out


def _key_bias(
    saliency: Tensor,
    selection: TokenSelection,
    forced: Tensor | None,
    log_bias: bool,
    dtype: torch.dtype,
) -> Tensor:
    """Return log saliency [B, S, N], 0 for forced and for dropped tokens."""
    if not log_bias:
        return torch.zeros_like(saliency, dtype=dtype)
    trusted = selection.slots >= 0
    if forced is not None:
        trusted = trusted & ~forced[:, None]
    return saliency.to(dtype).where(trusted, 1).log()


def _everything(q_len: int, k_len: int, device: torch.device) -> BlockMask:
    """Return the mask that shows every key to every query."""
    rows, columns = -(-q_len // _BLOCK), -(-k_len // _BLOCK)

    def lists(lines: int, ids: int) -> BlockLists:
        # an entry more than is read: a dimension of 1 would be compiled apart from longer ones
        every = torch.arange(lines * ids + 1, dtype=torch.int32, device=device)
        offsets = torch.arange(lines + 1, dtype=torch.int32, device=device) * ids
        return BlockLists(offsets[None, None], (every % (ids or 1))[None, None])

    return BlockMask(q_len, k_len, (_BLOCK, _BLOCK), lists(rows, columns), lists(columns, rows))


def _check_saliency(saliency: Any, q: Tensor, k: Tensor) -> Tensor:
    """Return saliency as [B, 1 or G, Nk]."""
    checks.require_tensor(_OP, "saliency", saliency)
    shapes = checks.Shapes(_OP)
    shapes.bind("k", k, "B G Nk D")
    shapes.bind("saliency", saliency, "B Nk" if saliency.dim() != 3 else "B G Nk")
    checks.require_floating(_OP, "saliency", saliency)
    checks.require_device(_OP, "saliency", saliency, q.device, "q")
    return saliency[:, None] if saliency.dim() == 2 else saliency


def _check_mask(key_mask: Any, q: Tensor, k: Tensor) -> None:
    if key_mask is None:
        return
    shapes = checks.Shapes(_OP)
    shapes.bind("k", k, "B G Nk D")
    shapes.bind("key_mask", key_mask, "B Nk")
    checks.require_dtype(_OP, "key_mask", key_mask, torch.bool)
    checks.require_device(_OP, "key_mask", key_mask, q.device, "q")


def _check_always(always: Any, share: int | tuple[int, int], q: Tensor, k: Tensor) -> Tensor | None:
    """Return which tokens are forced, bool [B or 1, Nk], or None."""
    num_tokens = k.shape[2]
    if isinstance(always, Tensor):
        shapes = checks.Shapes(_OP)
        shapes.bind("k", k, "B G Nk D")
        shapes.bind("always", always, "Nk" if always.dim() == 1 else "1|B Nk")
        checks.require_dtype(_OP, "always", always, torch.bool)
        checks.require_device(_OP, "always", always, q.device, "q")
        return always[None] if always.dim() == 1 else always
    checks.require_int(_OP, "always", always, low=0)
    capacity = keep_capacity(share, num_tokens)
    if always > capacity and num_tokens > capacity:  # a short sample keeps all it has
        raise ValueError(
            f"{_OP}: always is {always}; expected at most the number of kept tokens, K={capacity} "
            "(from keep)"
        )
    return (torch.arange(num_tokens, device=q.device) < always)[None] if always else None


def _check_pruning(prune_queries: bool, passthrough: Any, q: Tensor, k: Tensor) -> Tensor | None:
    checks.require_bool(_OP, "prune_queries", prune_queries)
    if prune_queries and q.shape[2] != k.shape[2]:
        raise ValueError(
            f"{_OP}: q {checks.describe(q)}; expected Nq = Nk for prune_queries, Nk={k.shape[2]} "
            "(from k)"
        )
    if passthrough is None:
        return None
    if not prune_queries:
        raise ValueError(f"{_OP}: passthrough is given; expected None without prune_queries")
    shapes = checks.Shapes(_OP)
    shapes.bind("q", q, "B H Nq D")
    shapes.bind("passthrough", passthrough, "B H Nq D")
    checks.require_floating(_OP, "passthrough", passthrough)
    checks.require_device(_OP, "passthrough", passthrough, q.device, "q")
    (passthrough,) = dispatch.autocast_inputs(passthrough)
    checks.require_dtype(_OP, "passthrough", passthrough, q.dtype)
    return passthrough


def _check_threshold(threshold: Any) -> None:
    if threshold is None:
        return
    if isinstance(threshold, bool) or not isinstance(threshold, (int, float)):
        raise TypeError(f"{_OP}: threshold {checks.describe(threshold)}; expected a float or None")
    if not math.isfinite(threshold):
        raise ValueError(f"{_OP}: threshold is {threshold}; expected a finite float")
