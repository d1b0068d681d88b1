"""Convolutions of voxels against dense x mask: every result and gradient, by the tolerance rule.

The three ops share kernels, maps and checks, so they share these tests, too.
"""

import json
from functools import partial
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F

from sparseattn import VoxelTensor, sparse_conv3d, sparse_conv_transpose3d, submanifold_conv3d
from sparseattn.testing.convolution import check, run
from sparseattn.testing.tolerance import judge, require
from sparseattn.testing.voxels import VoxelSpec as Spec
from sparseattn.testing.voxels import make

OPS = {
    "submanifold_conv3d": submanifold_conv3d,
    "sparse_conv3d": sparse_conv3d,
    "sparse_conv_transpose3d": sparse_conv_transpose3d,
}
TRITON_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DEVICES = {"torch": "cpu", "triton": TRITON_DEVICE, "reference": "cpu"}

pytestmark = pytest.mark.usefixtures("poisoned_memory")

Strided = partial(Spec, "sparse_conv3d", stride=2, padding=1)
CASES = {
    # submanifold: windows, even ones too
    **{f"k{k}": Spec(kernel=k) for k in (1, 2, 3, 5)},
    **{f"k{k}-dilated": Spec(kernel=k, dilation=2) for k in (2, 3, 5)},
    "three-sizes": Spec(kernel=(1, 3, 2), dilation=(1, 2, 3)),
    # strided, to all sites that a voxel reaches
    **{f"strided-k{k}": Strided(k, padding=k // 2) for k in (1, 2, 3, 5)},
    "strided-dilated": Strided(dilation=2, padding=2),
    "strided-no-padding": Strided(padding=0),
    "strided-three-sizes": Strided((2, 1, 3), stride=(2, 1, 3), padding=(0, 0, 1)),
    "stride-1": Spec("sparse_conv3d", padding=1),
    "stride-1-k5-dilated": Spec("sparse_conv3d", 5, dilation=2, padding=3),
    # to sites that are given
    "given-input": Spec("sparse_conv3d", padding=1, out="input"),
    "given": Strided(out="random", out_shape=(3, 3, 4), share=0.5),
    "given-and-not-reached": Strided(out="random", out_shape=(3, 3, 4), share=0.05),
    # channels and groups
    "one-channel": Spec(channels=(1, 32)),
    "one-to-one": Spec(channels=(1, 1)),
    "channels-18-33": Spec(channels=(18, 33)),
    "channels-64-80": Spec(channels=(64, 80), batch=1),
    "depthwise": Spec(channels=(6, 6), groups=6),
    "depthwise-k5": Spec(kernel=5, channels=(18, 18), groups=18),
    "depthwise-even": Spec(kernel=(2, 4, 1), channels=(5, 5), groups=5),
    "depthwise-strided": Strided(channels=(33, 33), groups=33),
    "depthwise-multiplier": Spec(channels=(4, 12), groups=4),
    "groups-2": Spec(channels=(6, 10), groups=2),
    "groups-2-strided": Strided(channels=(6, 10), groups=2),
    # sites
    "empty-sample": Spec(batch=3, share="ragged"),
    "empty-sample-strided": Strided(batch=3, share="ragged"),
    **{f"no-voxels-{op}": Spec(op, padding=1, share=0.0) for op in OPS},
    "no-voxels-depthwise": Spec(channels=(4, 4), groups=4, share=0.0),
    **{f"full-{op}": Spec(op, padding=1, share=2.0) for op in OPS},
    **{f"one-voxel-{op}": Spec(op, padding=1, batch=1, shape=(1, 1, 1), share=2.0) for op in OPS},
    "no-samples": Spec(batch=0),
    # memory and values
    "no-bias": Spec(bias=False),
    "strided-memory": Spec(layout="strided", dy_layout="strided"),
    "sum": Spec(dy_layout="scalar", channels=(4, 4), groups=4),
    "input-16": Strided(input_scale=16.0),
    "input-tenth": Strided(input_scale=0.1),
}

# In the interpreter a tile takes milliseconds a tap: small windows, and each case has its branch.
SMALL = {"batch": 1, "shape": (4, 4, 5)}
TRITON_CASES = {
    "k1": Spec(kernel=1, **SMALL),
    "k2": Spec(kernel=2, **SMALL),
    "k3": Spec(**SMALL),
    "k5": Spec(kernel=(1, 5, 1), dilation=2, **SMALL),
    "strided": Strided((2, 3, 1), padding=(0, 1, 0), **SMALL),
    "given": Strided((2, 1, 3), padding=1, out="random", out_shape=(3, 3, 3), **SMALL),
    "one-channel": Spec(kernel=(1, 3, 1), channels=(1, 32), **SMALL),
    "channels-18-33": Spec(kernel=(3, 1, 1), channels=(18, 33), **SMALL),
    "channels-80-72": Spec(kernel=(1, 1, 3), channels=(80, 72), **SMALL),
    "depthwise": Spec(channels=(6, 6), groups=6, **SMALL),
    "depthwise-wide": Strided((1, 2, 3), channels=(80, 80), groups=80, **SMALL),
    "depthwise-multiplier": Spec(kernel=(1, 1, 3), channels=(2, 6), groups=2, **SMALL),
    "groups-2": Spec(kernel=(1, 3, 1), channels=(6, 10), groups=2, **SMALL),
    "empty-sample": Spec(kernel=(1, 1, 3), batch=3, share="ragged"),
    "no-voxels": Spec(share=0.0),
    "no-voxels-depthwise": Spec(channels=(4, 4), groups=4, share=0.0),
    "full": Spec(kernel=(1, 3, 3), share=2.0, **SMALL),
    "no-bias": Spec(kernel=(3, 1, 1), bias=False, **SMALL),
    "strided-memory": Spec(kernel=(3, 1, 1), layout="strided", dy_layout="strided", **SMALL),
    "several-lists": Spec(kernel=(1, 3, 1), batch=1, shape=(9, 9, 9), share=0.4),
}


def compare(spec, impl, dtype=torch.float32, device="cpu"):
    convolve = OPS[spec.op]
    reference = partial(convolve, impl="reference")
    check(partial(convolve, impl=impl), reference, make(spec, dtype, device))


@pytest.mark.parametrize("case", CASES)
def test_torch_path(case):
    compare(CASES[case], "torch")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("case", CASES)
def test_torch_path_in_other_dtypes(case, dtype):
    compare(CASES[case], "torch", dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("case", ["k3", "groups-2-strided", "depthwise-strided"])
def test_torch_path_in_some_dtypes(case, dtype):
    compare(CASES[case], "torch", dtype)


@pytest.mark.parametrize("case", TRITON_CASES)
def test_triton_path(case):
    compare(TRITON_CASES[case], "triton", device=TRITON_DEVICE)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", ["k2", "depthwise-multiplier", "channels-18-33"])
def test_triton_path_in_16_bits(case, dtype):
    # the interpreter's own bfloat16 arithmetic is wrong; the launcher raises inputs to float32
    compare(TRITON_CASES[case], "triton", dtype, TRITON_DEVICE)


@pytest.mark.parametrize("channels", [(3, 5), (4, 4)])
def test_weight_gradient_in_splits(channels, monkeypatch):
    from sparseattn.kernels.sparse_conv3d import tuning

    monkeypatch.setattr(tuning, "SPLIT_SITES", 32)
    spec = Spec(kernel=(1, 1, 3), channels=channels, groups=channels[0] if channels[1] == 4 else 1)
    compare(spec, "triton", device=TRITON_DEVICE)


@pytest.mark.parametrize("case", ["k3", "groups-2", "depthwise", "strided-k3"])
def test_small_workspaces_give_the_same(case, monkeypatch):
    from sparseattn.ops.blocked import sparse_conv3d as blocked

    monkeypatch.setattr(blocked, "WORKSPACE", 1)  # one site at a time
    compare(CASES[case], "torch")


def test_torch_path_takes_sorted_maps():
    """What Triton sorted for itself serves the torch path too."""
    inputs = make(CASES["strided-k3"], torch.float64)
    from sparseattn.ops.blocked import sparse_conv3d as blocked

    x, dy, weight = inputs.features, inputs.dy, inputs.weight
    y = sparse_conv3d(inputs.place(x), weight, **inputs.options)
    plain = inputs.mask.kernel_map(3, stride=2, padding=1, out_sites=y)
    by_taps = plain.sorted_by_taps()
    for made in (plain, by_taps):
        got = blocked.forward(x, made.rows, made.order, weight, None, 1)
        require(judge("y", got, y.features, y.features))
    first, second = (
        blocked.weight_gradient(x, dy, m.rows, m.order, weight.shape, 1) for m in (plain, by_taps)
    )
    require(judge("dweight", first, second, second))
    back, back_sorted = by_taps.transposed(), by_taps.transposed().sorted_by_taps()
    first, second = (
        blocked.input_gradient(dy, m.rows, m.order, weight, 1, False) for m in (back, back_sorted)
    )
    require(judge("dx", first, second, second))


@pytest.mark.parametrize("impl", ["torch", "triton", "reference"])
@pytest.mark.parametrize("groups", [1, 4])
def test_equals_dense_convolution_times_mask(groups, impl):
    """The definition, written out once more, with NaN wherever nothing is active."""
    active = (torch.rand(2, 4, 3, 5) < 0.4)[:, None]
    volume = torch.randn(2, 4, 4, 3, 5)
    weight, bias = torch.randn(4, 4 // groups, 3, 1, 3), torch.randn(4)
    x = VoxelTensor.from_dense(volume.masked_fill(~active, torch.nan), active[:, 0])
    options = {"groups": groups, "impl": impl}
    same = submanifold_conv3d(x, weight, bias, **options).to_dense()
    down = sparse_conv3d(x, weight, bias, stride=2, padding=1, **options)
    shown = sparse_conv3d(x, weight, bias, stride=2, padding=1, out_sites=down, **options)
    assert torch.equal(down.features, shown.features)
    up = sparse_conv_transpose3d(down, weight, stride=2, padding=1, out_sites=x, **options)

    def dense(dtype):
        tensors = [t.to(dtype) for t in (volume * active, weight, bias)]
        same = F.conv3d(*tensors, padding=(1, 0, 1), groups=groups) * active
        reached = F.max_pool3d(F.pad(active.float(), (1,) * 6), (3, 1, 3), 2).bool()
        half = F.conv3d(*tensors, stride=2, padding=1, groups=groups) * reached
        back = {"stride": 2, "padding": 1, "output_padding": (1, 0, 0), "groups": groups}
        return same, half, F.conv_transpose3d(down.to_dense().to(dtype), tensors[1], **back)

    if up.spatial_shape[1] != 3:
        raise AssertionError(up)
    for name, found, naive, truth in zip(
        ("same", "down", "up"), (same, down.to_dense(), up.to_dense()), dense(torch.float32),
        dense(torch.float64), strict=True,
    ):  # fmt: skip
        naive, truth = (t * active if name == "up" else t for t in (naive, truth))
        require(judge(name, found, naive, truth))


def test_automatic_choice_is_the_torch_path_on_a_cpu():
    inputs = make(CASES["strided-k3"])
    auto, chosen = run(sparse_conv3d, inputs), run(partial(sparse_conv3d, impl="torch"), inputs)
    assert all(torch.equal(auto[name], chosen[name]) for name in chosen)


@st.composite
def specs(draw):
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    sizes = st.tuples(*[st.integers(1, 3)] * 3)
    low = st.tuples(*[st.integers(0, 2)] * 3)
    return Spec(
        draw(st.sampled_from(list(OPS))),
        kernel=draw(sizes),
        stride=draw(sizes),
        padding=draw(low),
        dilation=draw(sizes),
        channels=(groups * draw(st.integers(1, 4)), groups * draw(st.integers(1, 4))),
        groups=groups,
        bias=draw(st.booleans()),
        batch=draw(st.integers(2, 3)),
        shape=tuple(draw(st.integers(5, 8)) for _ in range(3)),
        share=draw(st.sampled_from(["ragged", 0.1, 0.5])),
        layout=draw(st.sampled_from(["contiguous", "strided"])),
        dy_layout=draw(st.sampled_from(["contiguous", "scalar"])),
        seed=draw(st.integers(0, 99)),
    )


QUICK = hypothesis.settings(
    derandomize=True, phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate]
)


@hypothesis.settings(QUICK, max_examples=20)
@hypothesis.given(specs())
def test_torch_path_on_random_inputs(spec):
    compare(spec, "torch")


# -- an independent witness --------------------------------------------------------------------

WITNESS = json.loads(Path(__file__).with_name("spconv_witness.json").read_text())


@pytest.mark.parametrize("impl", ["torch", "triton", "reference"])
@pytest.mark.parametrize("number", range(len(WITNESS["layers"])))
def test_equals_what_spconv_computed(number, impl):
    """Bit for bit, since all numbers are whole; make_spconv_witness.py says how it was made."""
    device = DEVICES[impl]

    def read(values, name):
        return torch.tensor(values[name], dtype=torch.float32, device=device)

    def voxels(values):
        places, features = read(values, "coordinates").int(), read(values, "features")
        return VoxelTensor(features, places, tuple(values["spatial_shape"]), WITNESS["batch_size"])

    x, theirs = voxels(WITNESS), WITNESS["layers"][number]
    weight, bias = read(theirs, "weight").permute(0, 4, 1, 2, 3), read(theirs, "bias")
    options = {n: v for n, v in theirs["options"].items() if n != "kernel_size"} | {"impl": impl}
    if theirs["layer"] == "SubMConv3d":
        y = submanifold_conv3d(x, weight, bias, **options)
    elif theirs["layer"] == "SparseConv3d":
        y = sparse_conv3d(x, weight, bias, **options)
    else:  # of what the layer before made
        given = voxels(WITNESS["layers"][number - 1])
        y = sparse_conv_transpose3d(given, weight.transpose(0, 1), bias, out_sites=x, **options)
    expected = voxels(theirs)
    expected.validate()
    assert len(y.features) == len(expected.features) > 0
    assert torch.equal(y.to_dense(), expected.to_dense())
    assert {*map(tuple, y.coordinates.tolist())} == {*map(tuple, expected.coordinates.tolist())}


@pytest.mark.parametrize("kind", ["submanifold", "strided", "inverse"])
@pytest.mark.parametrize("seed", range(3))
def test_agrees_with_spconv(kind, seed):
    """spconv 2.3 on the CPU, with one thread: with two its index is wrong now and then."""
    spconv = pytest.importorskip("spconv.pytorch", reason="spconv is not installed")
    inputs = make(Spec(channels=(4, 6), shape=(9, 8, 7), share=0.2, seed=seed))
    x = inputs.place(inputs.features)
    given = spconv.SparseConvTensor(x.features, x.coordinates.contiguous(), [9, 8, 7], 2)
    steps = {"stride": 2, "padding": 1}
    same = spconv.SubMConv3d(4, 6, 3, bias=False)
    down = spconv.SparseConv3d(4, 6, 3, bias=False, indice_key="down", **steps)
    up = spconv.SparseInverseConv3d(6, 4, 3, bias=False, indice_key="down")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        expected = same(given) if kind == "submanifold" else down(given)
        if kind == "inverse":
            expected = up(expected)
    finally:
        torch.set_num_threads(threads)

    def ours(dtype, impl):
        features = x.to(dtype)
        if kind == "submanifold":
            weight = same.weight.to(dtype).permute(0, 4, 1, 2, 3)
            return submanifold_conv3d(features, weight, impl=impl)
        half = sparse_conv3d(features, down.weight.to(dtype).permute(0, 4, 1, 2, 3), **steps)
        if kind == "strided":
            return half
        weight = up.weight.to(dtype).permute(4, 0, 1, 2, 3)
        return sparse_conv_transpose3d(half, weight, out_sites=x, impl=impl, **steps)

    found, truth = ours(torch.float32, "torch"), ours(torch.float64, "reference")
    active = {tuple(place) for place in found.coordinates.tolist()}
    assert active == {tuple(place) for place in expected.indices.tolist()}
    dense, wanted = found.to_dense().detach(), expected.dense().detach()
    naive = ours(torch.float32, "reference").to_dense().detach()
    truth = truth.to_dense().detach()
    require(judge("ours", dense, naive, truth), judge("spconv", wanted, naive, truth))
