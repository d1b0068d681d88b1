"""What the attention benchmarks share: inputs, naive rows, dense baselines, FLOPs and bytes."""

from __future__ import annotations

import importlib.util
import shutil
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from sparseattn.benchmarks.registry import Case, Provider, Work
from sparseattn.ops import work

BACKENDS = {
    "sdpa-flash": SDPBackend.FLASH_ATTENTION,
    "sdpa-cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa-efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa-math": SDPBackend.MATH,
}
Index = Callable[[], Any]
HALF = (torch.float16, torch.bfloat16)


def qkv(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """Return random q, k, v [B, H, N, D] that require grad, from the axes of the case."""
    random = case.generator()
    batch, heads, tokens, head_dim = (case[a] for a in ("batch", "heads", "tokens", "head_dim"))
    q, k, v = (
        torch.randn((batch, count, tokens, head_dim), generator=random, device=case.device)
        .to(case.dtype)
        .requires_grad_()
        for count in (heads, *2 * [int(case.axes.get("key_heads", heads))])
    )
    return q, k, v


def attention_rows(rows: Tensor, q: Tensor, k: Tensor, v: Tensor, shown: Any = None) -> Tensor:
    """Naive softmax attention of some queries; `shown` is bool [..., len(rows), Nk] or None."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    logits = q[..., rows, :] @ k.mT * q.shape[-1] ** -0.5
    if shown is not None:
        logits = logits.masked_fill(~shown, -torch.inf)
    return logits.softmax(-1) @ v


def attention_work(q: Tensor, k: Tensor, pairs: float) -> Work:
    """Softmax attention over `pairs` of all B * H * Nq * Nk pairs, lists read and written apart."""
    return work.attention_work(q.shape, k.shape, pairs, q.element_size())


def compiled_peer(case: Case, eager: Provider) -> list[Provider]:
    """On a GPU: an eager peer compiled. On a CPU, where it takes longer than it saves, nothing."""
    if case.device.type != "cuda":
        return []
    call = torch.compile(eager.call, dynamic=False)
    return [replace(eager, name=f"{eager.name}-compiled", call=call)]


def dense_baselines(case: Case, q: Tensor, k: Tensor) -> list[Provider]:
    """Dense attention at its best: every backend of SDPA, and flash-attn where it is installed."""
    scores = q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2]
    found = [
        Provider(
            name,
            partial(_sdpa, backend),
            dense=True,
            reference=attention_rows,
            unavailable=_sdpa_reason(name, case),
            scratch_bytes=3.0 * scores * max(4, q.element_size()) if name == "sdpa-math" else 0.0,
        )
        for name, backend in BACKENDS.items()
    ]
    reason = _flash_attn_reason(case)
    found.append(
        Provider(
            "flash-attn", _flash_attn, dense=True, reference=attention_rows, unavailable=reason
        )
    )
    return found


def flex_providers(
    case: Case, q: Tensor, k: Tensor, compiled_index: Index, eager_index: Index
) -> list[Provider]:
    """FlexAttention: compiled, and on a CPU, where neither has a backward, eager too.

    The indices build FlexAttention's BlockMask; the eager one reads its mask_mod alone.
    """
    scores = q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2]
    on_cpu = case.device.type == "cpu"
    compiled = Provider(
        "flex-compiled",
        _flex_compiled,
        compiled_index,
        backward=not on_cpu,
        unavailable=_compile_reason(case),
    )
    eager = Provider(
        "flex-eager", _flex_eager, eager_index, backward=False, scratch_bytes=20.0 * scores
    )
    return [compiled, eager] if on_cpu else [compiled]


def _sdpa(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(backend):
        return scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1])


def _sdpa_reason(name: str, case: Case) -> str:
    if case.device.type == "cpu" and name in ("sdpa-cudnn", "sdpa-efficient"):
        return "needs a GPU"
    if case.device.type == "cuda" and name in ("sdpa-flash", "sdpa-cudnn"):
        return "" if case.dtype in HALF else "takes float16 and bfloat16"
    return ""


def _flash_attn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from flash_attn import flash_attn_func  # type: ignore[import-not-found]

    out: Tensor = flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v)))
    return out.transpose(1, 2)


def _flash_attn_reason(case: Case) -> str:
    if importlib.util.find_spec("flash_attn") is None:
        return "flash-attn is not installed"
    if case.device.type != "cuda":
        return "needs a GPU"
    return "" if case.dtype in HALF else "takes float16 and bfloat16"


@cache
def _compiled_flex(device: str) -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    # without the search its only tiles are 128 wide, and smaller blocks are refused
    mode = "max-autotune-no-cudagraphs" if device == "cuda" else None
    return torch.compile(flex_attention, dynamic=False, mode=mode)


def _forward_only(*tensors: Tensor) -> Iterator[Tensor]:
    """FlexAttention on a CPU refuses inputs that require grad."""
    return (x.detach() if x.device.type == "cpu" else x for x in tensors)


def _flex_compiled(q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Tensor:
    q, k, v = _forward_only(q, k, v)
    flex = _compiled_flex(q.device.type)
    out: Tensor = flex(q, k, v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1])
    return out


def _flex_eager(q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Tensor:
    q, k, v = _forward_only(q, k, v)
    from torch.nn.attention.flex_attention import flex_attention

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is not compiled; that is the point here
        out: Any = flex_attention(q, k, v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1])
    return out


def _compile_reason(case: Case) -> str:
    compilers = ("c++", "g++", "clang++")
    if case.device.type == "cpu" and not any(map(shutil.which, compilers)):
        return "needs a C++ compiler"
    return ""
