"""The two stages by themselves: what Nystrom attention and other landmarks build on."""

import math

import pytest
import torch

from sparseattn.ops.landmark_stages import stage1, stage2
from sparseattn.testing.landmarks import require_close

DEVICES = {"torch": "cpu", "triton": "cuda" if torch.cuda.is_available() else "cpu"}

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def plain_stage1(landmarks, k, v, key_bias, segments, scale):
    """Softmax attention of landmarks over keys, its lse, and sums over segments."""
    shown = key_bias > -math.inf
    k, v = (t.masked_fill(~shown[..., None], 0) for t in (k, v))
    logits = scale * landmarks @ k.mT + key_bias[:, :, None]
    member = torch.nn.functional.one_hot(segments.long() + 1, landmarks.shape[2] + 1)[..., 1:]
    return logits.softmax(-1) @ v, logits.logsumexp(-1), member.to(k.dtype).mT[:, None] @ k


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize(("m", "N", "D"), [(16, 150, 32), (49, 197, 24), (20, 7, 16)])
def test_stage1_with_landmarks_of_every_head_and_sums_of_segments(m, N, D, impl):
    device = DEVICES[impl]
    landmarks, k, v = (torch.randn(2, 2, n, D, device=device) for n in (m, N, N))
    bias = torch.randn(2, 1, N, device=device)
    bias[:, :, 3] = -math.inf
    segments = (torch.arange(N, device=device) * m // N).int().repeat(2, 1)
    segments[1, -1] = -1
    sent = [torch.randn(*shape, device=device) for shape in ((2, 2, m, D), (2, 2, m), (2, 2, m, D))]

    def results(call, dtype):
        leaves = [t.to(dtype).requires_grad_() for t in (landmarks, k, v, bias)]
        found = call(*leaves)
        return (*found, *torch.autograd.grad(found, leaves, [t.to(dtype) for t in sent]))

    truth = results(lambda *x: plain_stage1(*x, segments, 0.3), torch.float64)

    def ours(*x):
        values, lse, _, sums = stage1(*x, segments, scale=0.3, impl=impl)
        return values, lse, sums

    names = ("out", "out", "out", "dlandmarks", "dk", "dv", "dbias")
    for name, result, expected in zip(names, results(ours, torch.float32), truth, strict=True):
        expected = expected.nan_to_num(0.0)  # the slope of a hidden key's bias
        require_close(name, result, expected, expected.norm(), torch.float32)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_grouped_heads_stack_their_landmarks(impl):
    """H query heads over G key heads: landmarks [B, H, m, D] are [B, G, H / G * m, D]."""
    device = DEVICES[impl]
    landmarks = torch.randn(1, 4, 10, 16, device=device)
    k, v = torch.randn(2, 1, 2, 60, 16, device=device).unbind()
    stacked = landmarks.unflatten(1, (2, 2)).flatten(2, 3)
    values, lse, *_ = stage1(stacked, k, v, None, scale=0.25, impl=impl)
    logits = 0.25 * landmarks.double() @ k.double().repeat_interleave(2, 1).mT
    expected = logits.softmax(-1) @ v.double().repeat_interleave(2, 1)
    found = values.unflatten(2, (2, 10)).flatten(1, 2)
    require_close("out", found, expected, expected.norm(), torch.float32)
    lse = lse.unflatten(2, (2, 10)).flatten(1, 2)
    require_close("out", lse, logits.logsumexp(-1), logits.logsumexp(-1).norm(), torch.float32)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_a_hidden_landmark_is_not_seen(impl):
    device = DEVICES[impl]
    q, landmarks, values = (torch.randn(2, 2, n, 16, device=device) for n in (30, 12, 12))
    bias = torch.randn(2, 2, 12, device=device)
    bias[:, :, 4:] = -math.inf
    bias[1] = -math.inf  # nothing is left for the second sample
    q = q.requires_grad_()
    out = stage2(q, landmarks, values, bias, scale=0.25, impl=impl)
    (dq,) = torch.autograd.grad(out.sum(), q)
    expected = stage2(
        q, landmarks[:, :, :4], values[:, :, :4], bias[:, :, :4], scale=0.25, impl=impl
    )
    require_close("out", out[0], expected[0].double(), expected[0].norm(), torch.float32)
    assert (out[1] == 0).all() and (dq[1] == 0).all() and dq[0].abs().sum() > 0
