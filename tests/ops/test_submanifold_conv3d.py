"""Convolutions of patches against dense x mask: every result and gradient, by the tolerance rule.

submanifold_conv3d, and sparse_conv3d with a stride: they share kernels and checks, so tests, too.
"""

from functools import partial

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F

from sparseattn import PatchGrid, PatchMask, sparse_conv3d, submanifold_conv3d
from sparseattn.testing.convolution import ConvSpec as Spec
from sparseattn.testing.convolution import check, make, run
from sparseattn.testing.tolerance import judge, require

TRITON_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

pytestmark = pytest.mark.usefixtures("poisoned_memory")

CASES = {
    # kernels, even ones too, and windows that reach several patches away
    **{f"k{k}-p{p}": Spec(p, k) for k in (1, 2, 3, 5) for p in (1, 2, 4)},
    **{f"k{k}-dilated-p{p}": Spec(p, k, dilation=2) for k in (2, 3, 5) for p in (1, 3)},
    "kernel-and-patch-of-three-sizes": Spec((1, 2, 3), (1, 3, 2), dilation=(1, 2, 3)),
    # patches
    **{f"p{p}": Spec(p, grid=(1, 1, 2), batch=1, keep=2) for p in range(5, 17)},
    # sums so long that their order matters (decision 0009)
    "long-sums": Spec(8, channels=(16, 16), batch=1, grid=(1, 1, 2), keep=2),
    "long-sums-p4": Spec(4, channels=(32, 64), batch=1, grid=(1, 2, 2), keep=3),
    "long-sums-few-channels": Spec(12, channels=(2, 2), batch=1, grid=(2, 2, 1), keep=2),
    # channels and groups
    "one-channel": Spec(2, channels=(1, 32)),
    "to-one-channel": Spec(2, channels=(7, 1)),
    "channels-18-33": Spec(2, channels=(18, 33)),
    "channels-64-80": Spec(2, channels=(64, 80), batch=1),
    "depthwise": Spec(2, channels=(6, 6), groups=6),
    "depthwise-k5": Spec(3, 5, channels=(18, 18), groups=18),
    "depthwise-dilated": Spec(1, channels=(33, 33), groups=33, dilation=2),
    "depthwise-even": Spec(2, (2, 4, 1), channels=(5, 5), groups=5),
    "depthwise-p8": Spec(8, channels=(6, 6), groups=6, batch=1, grid=(2, 2, 1), keep=2),
    "depthwise-multiplier": Spec(2, channels=(4, 12), groups=4),
    "groups-2": Spec(2, channels=(6, 10), groups=2),
    "groups-3-to-one-channel": Spec(2, channels=(6, 3), groups=3, dilation=2),
    # masks
    "empty-sample": Spec(2, batch=3, keep="ragged"),
    "empty-sample-depthwise": Spec(4, channels=(4, 4), groups=4, batch=3, keep="ragged"),
    "no-patches": Spec(2, keep=0),
    "no-patches-depthwise": Spec(2, channels=(4, 4), groups=4, keep=0),
    "one-patch": Spec(2, batch=1, keep=1),
    "full": Spec(2, keep=12),
    "full-p4": Spec(4, batch=1, grid=(2, 2, 2), keep=8),
    "no-samples": Spec(2, batch=0),
    "one-voxel": Spec(1, batch=1, grid=(1, 1, 1), keep=1),
    # memory and values
    "no-bias": Spec(2, bias=False),
    "channels-first": Spec(2, layout="channels-first", dy_layout="channels-first"),
    "strided": Spec(3, layout="strided", dy_layout="strided"),
    "sum": Spec(2, dy_layout="scalar", channels=(4, 4), groups=4),
    "input-16": Spec(2, input_scale=16.0),
    "input-tenth": Spec(2, input_scale=0.1),
}

Strided = partial(Spec, stride=2, padding=1)
STRIDED_CASES = {
    **{f"p{p}": Strided(p, grid=(1, 2, 2), batch=1, keep=3) for p in (2, 4, 6, 8)},
    "k2": Strided(4, 2, padding=0),
    "k4": Strided(4, 4),
    "k5": Strided(4, 5, padding=2),
    "k1": Strided(2, 1, padding=0),
    "k3-dilated": Strided(4, dilation=2, padding=2),
    "k3-dilated-as-the-stride": Strided(6, stride=3, dilation=3, padding=3),
    "stride-3-k3": Strided(6, stride=3),
    "stride-4-k7": Strided(4, 7, stride=4, padding=3),
    "stride-6-dilated-4": Strided(
        6, (3, 1, 1), stride=(6, 2, 1), dilation=(4, 1, 1), padding=(4, 0, 0)
    ),
    "three-sizes": Strided((2, 6, 3), (3, 4, 3), stride=(2, 3, 1), padding=1),
    "stride-1": Strided(2, stride=1),
    "two-patches-away": Strided(2, (1, 7, 1), padding=(0, 3, 0), grid=(2, 5, 2)),
    "depthwise": Strided(4, channels=(6, 6), groups=6),
    "depthwise-p2": Strided(2, channels=(18, 18), groups=18),
    "groups-2": Strided(4, channels=(6, 10), groups=2),
    "multiplier": Strided(2, channels=(4, 12), groups=4),
    "channels-18-33": Strided(2, channels=(18, 33), batch=1),
    "channels-first": Strided(4, layout="channels-first", dy_layout="channels-first"),
    "strided-memory": Strided(2, layout="strided", dy_layout="strided"),
    "sum": Strided(4, dy_layout="scalar", bias=False),
    "empty-sample": Strided(2, batch=3, keep="ragged"),
    "no-patches": Strided(2, keep=0),
    "no-samples": Strided(2, batch=0),
    "full": Strided(4, keep=12),
}  # fmt: skip
CASES |= {f"strided-{name}": spec for name, spec in STRIDED_CASES.items()}

# In the interpreter a tile takes milliseconds a tap: few sites, and each case has its branch.
SMALL = {"batch": 1, "grid": (2, 2, 1), "keep": 3}
TRITON_CASES = {
    "k1": Spec(2, 1, **SMALL),
    "k2": Spec(2, 2, **SMALL),
    "k3": Spec((1, 2, 2), **SMALL),
    "k5-three-patches-away": Spec(1, (1, 5, 1), dilation=3, **SMALL),
    "dilated": Spec((1, 2, 3), (1, 3, 2), dilation=(1, 2, 3), **SMALL),
    "p5": Spec(5, (1, 1, 3), batch=1, grid=(1, 2, 1), keep=2),
    "one-channel": Spec(2, (1, 3, 1), channels=(1, 32), **SMALL),
    "channels-18-33": Spec(2, (3, 1, 1), channels=(18, 33), **SMALL),
    "channels-80-72": Spec(2, (1, 1, 3), channels=(80, 72), **SMALL),
    "depthwise": Spec(2, channels=(6, 6), groups=6, **SMALL),
    "depthwise-wide": Spec(2, (1, 2, 3), channels=(80, 80), groups=80, dilation=2, **SMALL),
    "depthwise-multiplier": Spec(2, (1, 1, 3), channels=(2, 6), groups=2, **SMALL),
    "groups-2": Spec(2, (1, 3, 1), channels=(6, 10), groups=2, **SMALL),
    "empty-sample": Spec(2, (1, 1, 3), batch=3, grid=(2, 2, 1), keep="ragged"),
    "no-patches": Spec(2, keep=0),
    "no-patches-depthwise": Spec(2, channels=(4, 4), groups=4, keep=0),
    "full": Spec(2, (1, 3, 3), batch=1, grid=(1, 2, 2), keep=4),
    "no-bias": Spec(2, (3, 1, 1), bias=False, **SMALL),
    "strided": Spec(2, (3, 1, 1), layout="strided", dy_layout="channels-first", **SMALL),
    "strided-k3": Strided(2, **SMALL),
    "strided-k4": Strided((4, 2, 1), (4, 1, 3), stride=(2, 2, 1), padding=(1, 0, 1), **SMALL),
    "strided-dilated": Strided(
        (6, 1, 1), (3, 1, 1), stride=(6, 1, 1), dilation=(4, 1, 1), padding=(4, 0, 0), **SMALL
    ),
    "strided-groups-2": Strided((2, 2, 4), (1, 3, 3), stride=(1, 2, 2), padding=(0, 1, 1),
                                channels=(6, 10), groups=2, **SMALL),
    "strided-channels-80-72": Strided((1, 1, 4), (1, 1, 3), stride=(1, 1, 2), padding=(0, 0, 1),
                                      channels=(80, 72), **SMALL),
    "strided-depthwise": Strided(2, channels=(6, 6), groups=6, **SMALL),
    "strided-depthwise-wide": Strided((4, 1, 1), (3, 1, 1), stride=(2, 1, 1), padding=(1, 0, 0),
                                      channels=(80, 80), groups=80, **SMALL),
    "strided-empty-sample": Strided((1, 2, 2), (1, 3, 3), stride=(1, 2, 2), padding=(0, 1, 1),
                                    batch=3, grid=(2, 2, 1), keep="ragged"),
    "strided-no-patches": Strided(2, keep=0),
    "strided-by-place": Strided((1, 4, 1), (1, 3, 1), stride=(1, 2, 1), padding=(0, 1, 0),
                                grid=(5, 4, 8), keep=130),
    "by-place": Spec((1, 2, 1), (1, 3, 1), grid=(5, 4, 8), keep=130),
}  # fmt: skip


def op_of(spec):
    return submanifold_conv3d if spec.stride is None else sparse_conv3d


def compare(spec, impl, dtype=torch.float32, device="cpu"):
    op = op_of(spec)
    check(partial(op, impl=impl), partial(op, impl="reference"), make(spec, dtype, device))


@pytest.mark.parametrize("case", CASES)
def test_torch_path(case):
    compare(CASES[case], "torch")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("case", CASES)
def test_torch_path_in_other_dtypes(case, dtype):
    compare(CASES[case], "torch", dtype)


@pytest.mark.parametrize("case", TRITON_CASES)
def test_triton_path(case):
    compare(TRITON_CASES[case], "triton", device=TRITON_DEVICE)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "case",
    ["k2", "depthwise-multiplier", "channels-18-33", "empty-sample", "strided-k4",
     "strided-depthwise"],
)  # fmt: skip
def test_triton_path_in_16_bits(case, dtype):
    # the interpreter's own bfloat16 arithmetic is wrong; the launcher raises inputs to float32
    compare(TRITON_CASES[case], "triton", dtype, TRITON_DEVICE)


def test_weight_gradient_in_splits(monkeypatch):
    from sparseattn.kernels.sparse_conv3d import tuning

    monkeypatch.setattr(tuning, "SPLIT_SITES", 32)
    assert tuning.splits(100, 32, 1) == (100, 1) and tuning.splits(100, 32, 100) == (10, 10)
    spec = Spec((5, 5, 3), (1, 1, 3), **SMALL)
    compare(spec, "triton", device=TRITON_DEVICE)
    spec = Spec((5, 5, 3), (1, 1, 3), channels=(4, 4), groups=4, **SMALL)
    compare(spec, "triton", device=TRITON_DEVICE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "case", ["k3-p2", "k3-p4", "groups-2", "depthwise-p8", "strided-depthwise", "channels-18-33"]
)
def test_small_workspaces_give_the_same(case, dtype, monkeypatch):
    from sparseattn.ops.blocked import patch_conv3d as blocked

    monkeypatch.setattr(blocked, "WORKSPACE", 1)  # one patch and 16 channels at a time
    compare(CASES[case], "torch", dtype)


@pytest.mark.parametrize("impl", ["torch", "triton", "reference"])
@pytest.mark.parametrize("groups", [1, 4])
def test_equals_dense_convolution_times_mask(groups, impl):
    """The definition, written out once more, with NaN wherever the mask hides."""
    mask = PatchMask.from_scores(torch.rand(2, 2, 1, 2), 2)
    active = mask.to_dense((2, 3, 2))[:, None]
    volume = torch.randn(2, 4, 4, 3, 4, dtype=torch.float32)
    weight, bias = torch.randn(4, 4 // groups, 3, 1, 3), torch.randn(4)
    x = PatchGrid.from_dense(volume.masked_fill(~active, torch.nan), mask)
    options = {"groups": groups, "impl": impl}
    y = submanifold_conv3d(x, weight, bias, **options).to_dense()

    def dense(dtype):
        tensors = (t.to(dtype) for t in (volume * active, weight, bias))
        return F.conv3d(*tensors, padding=(1, 0, 1), groups=groups) * active

    naive, truth = dense(torch.float32), dense(torch.float64)
    require(judge("y", y, naive, truth))
    assert (y[(~active).expand_as(y)] == 0).all()
    half = sparse_conv3d(x, weight, bias, stride=(2, 3, 2), padding=(1, 0, 1), **options)
    shown = active[..., ::2, ::3, ::2]

    def strided(dtype):
        tensors = (t.to(dtype) for t in (volume * active, weight, bias))
        return F.conv3d(*tensors, stride=(2, 3, 2), padding=(1, 0, 1), groups=groups) * shown

    naive, truth = strided(torch.float32), strided(torch.float64)
    require(judge("strided", half.to_dense(), naive, truth))


def test_automatic_choice_is_the_torch_path_on_a_cpu():
    inputs = make(CASES["k3-p2"])
    auto = run(submanifold_conv3d, inputs)
    chosen = run(partial(submanifold_conv3d, impl="torch"), inputs)
    assert all(torch.equal(auto[name], chosen[name]) for name in chosen)


@st.composite
def specs(draw):
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    sizes = st.tuples(*[st.integers(1, 4)] * 3)
    patch, kernel = draw(sizes), draw(sizes)
    dilation = draw(st.tuples(*[st.integers(1, 3)] * 3))
    window = {}
    if draw(st.booleans()):  # a stride and a padding that the window allows
        stride = draw(st.tuples(*[st.integers(1, 4)] * 3))
        extents = [d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True)]
        patch = tuple(-(-p // s) * s for p, s in zip(patch, stride, strict=True))
        padding = tuple((e - 1) // 2 for e in extents)
        fits = all(e <= s + 2 * low for e, s, low in zip(extents, stride, padding, strict=True))
        hypothesis.assume(fits)
        window = {"stride": stride, "padding": padding}
    return Spec(
        patch=patch,
        kernel=kernel,
        **window,
        dilation=dilation,
        channels=(groups * draw(st.integers(1, 4)), groups * draw(st.integers(1, 4))),
        groups=groups,
        bias=draw(st.booleans()),
        batch=draw(st.integers(1, 3)),
        grid=draw(sizes),
        keep=draw(st.sampled_from(["ragged", 0, 1])),
        layout=draw(st.sampled_from(["contiguous", "channels-first", "strided"])),
        dy_layout=draw(st.sampled_from(["contiguous", "scalar"])),
        seed=draw(st.integers(0, 99)),
    )


QUICK = hypothesis.settings(
    derandomize=True, phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate]
)


@hypothesis.settings(QUICK, max_examples=15)
@hypothesis.given(specs())
def test_torch_path_on_random_inputs(spec):
    compare(spec, "torch")


# HySparK's encoder: 54 of 6 x 6 x 6 patches, a quarter of the volume
HYSPARK = {"batch": 1, "grid": (6, 6, 6), "keep": 54}
LEVELS = {
    "24": Spec(4, channels=(128, 128), groups=128, **HYSPARK),
    "24-expand": Spec(4, (3, 3, 1), channels=(128, 256), **HYSPARK),
    "12": Spec(2, channels=(256, 256), groups=256, **HYSPARK),
    "6": Spec(1, (1, 3, 3), channels=(384, 384), **HYSPARK),
}


@pytest.mark.slow
@pytest.mark.parametrize("level", LEVELS)
def test_levels_of_hyspark(level):
    assert make(LEVELS[level]).mask.to_dense().float().mean() == 0.25
    compare(LEVELS[level], "torch")
