"""Seeded inputs of the linear attentions, and the rule their results are held against.

These ops approximate softmax attention, and are held against their own definition in float64, with
errors measured as a whole (docs/decisions/0008-relative-errors.md):

    |result - truth|_2 <= limit * |truth|_2
    |result - truth|_2 <= 2 * |naive - truth|_2 + |floor|_2

The limits are those of LIMITS; the floor is that of sparseattn.testing.tolerance.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from sparseattn.testing.inputs import lay_out
from sparseattn.testing.tolerance import NAIVE_FACTOR, Judgement, require, rounding_floor

Attend = Callable[..., Tensor]
LIMITS = {  # of the output, of gradients
    torch.float64: (1e-12, 1e-11),
    torch.float32: (1e-5, 1e-4),
    torch.float16: (1e-3, 3e-3),
    torch.bfloat16: (5e-3, 1.5e-2),
}


@dataclass(frozen=True)
class LandmarkSpec:
    """What inputs to make.

    landmarks: m, the features or projected tokens.
    layout, dout_layout: as in sparseattn.testing.inputs.
    key_mask: "tail" pads samples at the end, "random" anywhere, "nothing" hides all keys of the
        first sample. Hidden keys hold NaN.
    input_scale: standard deviation of q, k and v.
    correlated: tokens that follow one another are alike, and so are a token's q and k, as in
        images; else all numbers are independent.
    """

    q_len: int
    k_len: int | None = None
    head_dim: int = 32
    batch: int = 2
    heads: int = 2
    key_heads: int | None = None
    landmarks: int = 24
    layout: str = "contiguous"
    dout_layout: str = "contiguous"
    input_scale: float = 1.0
    scale: float | None = None
    key_mask: Literal["tail", "random", "nothing"] | None = None
    correlated: bool = False
    seed: int = 0


@dataclass(frozen=True)
class OpInputs:
    """Keyword arguments of an op, which of them get a gradient, and the gradient of the output."""

    arguments: dict[str, Any]
    leaves: tuple[str, ...]
    dout: Tensor

    def to(self, dtype: torch.dtype) -> OpInputs:
        """Return the inputs with all floating point tensors in `dtype`."""

        def cast(value: Any) -> Any:
            is_float = isinstance(value, Tensor) and value.is_floating_point()
            return value.to(dtype) if is_float else value

        arguments = {name: cast(value) for name, value in self.arguments.items()}
        return replace(self, arguments=arguments, dout=cast(self.dout))

    def changed(self, **arguments: Any) -> OpInputs:
        """Return the inputs with other arguments."""
        return replace(self, arguments=self.arguments | arguments)


def make(
    spec: LandmarkSpec,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> OpInputs:
    """Make q, k, v, dout and a key mask, drawn on the host."""
    random = torch.Generator().manual_seed(spec.seed)
    k_len = spec.q_len if spec.k_len is None else spec.k_len
    key_heads = spec.heads if spec.key_heads is None else spec.key_heads
    queries = (spec.batch, spec.heads, spec.q_len, spec.head_dim)
    keys = (spec.batch, key_heads, k_len, spec.head_dim)
    q, k, v = (torch.randn(s, generator=random) * spec.input_scale for s in (queries, keys, keys))
    if spec.correlated:
        k, v = (_interpolated(t, spec.input_scale, random) for t in (k, v))
        q = 0.3 * q + k.repeat_interleave(spec.heads // key_heads, 1)
    dout = torch.randn(queries, generator=random)
    arguments: dict[str, Any] = {}
    if spec.key_mask is not None:
        shown = _key_mask(spec, k_len, random)
        k, v = (t.masked_fill(~shown[:, None, :, None], math.nan) for t in (k, v))
        arguments["key_mask"] = shown.to(device)
    tensors = {"q": q, "k": k, "v": v}
    laid = {n: lay_out(t.to(device, dtype), spec.layout) for n, t in tensors.items()}
    sent = lay_out(dout.to(device, dtype), spec.dout_layout)
    return OpInputs(laid | arguments, ("q", "k", "v"), sent)


def performer(
    spec: LandmarkSpec,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> OpInputs:
    """Make inputs of performer_attention, with a normal projection."""
    inputs = make(spec, dtype, device)
    random = torch.Generator().manual_seed(spec.seed + 1)
    projection = torch.randn((spec.landmarks, spec.head_dim), generator=random).to(device, dtype)
    inputs = inputs.changed(projection=projection, scale=spec.scale)
    return replace(inputs, leaves=("q", "k", "v", "projection"))


def linformer(
    spec: LandmarkSpec,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    sharing: Literal["headwise", "key-value", "none"] = "headwise",
) -> OpInputs:
    """Make inputs of linformer_attention.

    sharing: "headwise": one projection for all heads, keys and values; "key-value": one for keys
        and one for values; "none": those for every head.
    """
    inputs = make(spec, dtype, device)
    random = torch.Generator().manual_seed(spec.seed + 1)
    k_len, heads = inputs.arguments["k"].shape[2], inputs.arguments["k"].shape[1]
    shape = (*([heads] if sharing == "none" else []), spec.landmarks, k_len)
    names = ["key_projection"] if sharing == "headwise" else ["key_projection", "value_projection"]
    for name in names:
        projection = torch.randn(shape, generator=random) / max(1, k_len) ** 0.5
        inputs = inputs.changed(**{name: projection.to(device, dtype)})
    return replace(inputs.changed(scale=spec.scale), leaves=("q", "k", "v", *names))


def nystrom(
    spec: LandmarkSpec,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    residual: tuple[int, ...] = (),
) -> OpInputs:
    """Make inputs of nystrom_attention, whose keys are the tokens of its queries.

    residual: sizes of the filter that every head gets; none: no residual.
    """
    tokens = spec.q_len if spec.k_len is None else min(spec.q_len, spec.k_len)
    inputs = make(replace(spec, q_len=tokens, k_len=None), dtype, device)
    inputs = inputs.changed(num_landmarks=spec.landmarks, scale=spec.scale)
    if not residual:
        return inputs
    random = torch.Generator().manual_seed(spec.seed + 1)
    filters = torch.randn((inputs.arguments["k"].shape[1], *residual), generator=random)
    inputs = inputs.changed(residual=filters.to(device, dtype))
    return replace(inputs, leaves=("q", "k", "v", "residual"))


def newton_schulz(
    spec: LandmarkSpec,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> OpInputs:
    """Make inputs of newton_schulz; q_len is m. Masked landmarks are 0, as means of nothing are."""
    made = make(spec, dtype, device)
    found = dict(made.arguments)
    mask = found.pop("key_mask", None)
    arguments = dict(zip(("queries", "keys", "values"), found.values(), strict=True))
    if mask is not None:
        arguments = {n: t.masked_fill(~mask[:, None, :, None], 0) for n, t in arguments.items()} | {
            "landmark_mask": mask
        }
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    arguments |= {"values": arguments["values"].to(wide), "scale": spec.scale}
    return OpInputs(arguments, ("queries", "keys", "values"), made.dout.to(wide))


def run(attend: Attend, inputs: OpInputs) -> dict[str, Tensor]:
    """Return the output and the gradient of every leaf."""
    leaves = {n: inputs.arguments[n].detach().requires_grad_() for n in inputs.leaves}
    out = attend(**inputs.arguments | leaves)
    found = {"out": out.detach()}
    if leaves:
        wanted = list(leaves.values())
        gradients = torch.autograd.grad(out, wanted, inputs.dout, materialize_grads=True)
        found |= {f"d{name}": g for name, g in zip(leaves, gradients, strict=True)}
    return found


def check(attend: Attend, reference: Attend, inputs: OpInputs, limits_only: bool = False) -> None:
    """Raise AssertionError with all errors if one result breaks the rule.

    limits_only: for inputs so large that a few weights are all, and their exponents, of hundreds,
        are rounded well or badly by chance; and for references written another way.
    """
    truth, naive = run(reference, inputs.to(torch.float64)), run(reference, inputs)
    result = run(attend, inputs)
    judgements = []
    for name in truth:
        like = inputs.dout if name == "out" else inputs.arguments[name.removeprefix("d")]
        judgements.append(_limited(name, result[name], truth[name], truth[name].norm(), like.dtype))
        if (
            like.dtype != torch.float64 and not limits_only
        ):  # there the truth is no more exact than the result
            judgements.append(_beside_naive(name, result[name], naive[name], truth[name]))
    require(*judgements)


def judge(
    name: str, result: Tensor, naive: Tensor, truth: Tensor, _: Tensor | None = None
) -> Judgement:
    """Hold one result, "out" or a gradient, against both lines of the rule.

    Called as `sparseattn.testing.tolerance.judge`; sizes of terms have no part in this rule.
    """
    limited = _limited(name, result, truth, truth.norm(), naive.dtype)
    beside = _beside_naive(name, result, naive, truth)
    return replace(beside, faults=limited.faults + beside.faults)


def require_close(
    name: str, result: Tensor, truth: Tensor, size: Tensor, dtype: torch.dtype
) -> None:
    """Raise AssertionError unless |result - truth| is within the limit of `dtype` times size.

    For a truth whose terms cancel, where size is that of the terms.
    """
    require(_limited(name, result, truth, size, dtype))


def _limited(
    name: str, result: Tensor, truth: Tensor, size: Tensor, dtype: torch.dtype
) -> Judgement:
    limit, size = LIMITS[dtype][name != "out"], size.detach()
    error, allowed = float((result.double() - truth).norm()), limit * float(size)
    faults = []
    if result.dtype != dtype or result.shape != truth.shape:
        faults.append(f"is {result.dtype} {list(result.shape)}")
    if not error <= allowed:  # an error of NaN is over, too
        faults.append(f"relative error {error / max(float(size), 1e-300):.3g} is over {limit:.3g}")
    return Judgement(name, error, allowed, error, allowed, tuple(faults))


def _beside_naive(name: str, result: Tensor, naive: Tensor, truth: Tensor) -> Judgement:
    error, baseline = (float((t.double() - truth).norm()) for t in (result, naive))
    floor = float(rounding_floor(truth, result.dtype).norm())
    allowed = NAIVE_FACTOR * baseline + floor
    faults = () if error <= allowed else ("the naive reference is twice as exact",)
    return Judgement(name, error, allowed, error, allowed, faults)


def _interpolated(noise: Tensor, size: float, random: torch.Generator) -> Tensor:
    """Return noise on lines between random tokens, one in eight."""
    batch, heads, length, width = noise.shape
    knots = torch.randn((batch * heads, width, length // 8 + 2), generator=random) * size
    lines = torch.nn.functional.interpolate(knots, length, mode="linear", align_corners=True)
    return 0.3 * noise + lines.view(batch, heads, width, length).mT


def _key_mask(spec: LandmarkSpec, k_len: int, random: torch.Generator) -> Tensor:
    if spec.key_mask == "tail":
        lengths = torch.linspace(0.4, 0.9, spec.batch) * k_len
        return torch.arange(k_len) < lengths.ceil()[:, None]
    shown = torch.rand((spec.batch, k_len), generator=random) < 0.6
    if spec.key_mask == "nothing":
        shown[:1] = False
    return shown
