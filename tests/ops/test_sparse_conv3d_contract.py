"""What convolutions of voxels promise: derivatives, equal bits, compile, autocast, errors."""

import re
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from sparseattn import VoxelTensor, sparse_conv3d, sparse_conv_transpose3d, submanifold_conv3d
from sparseattn.testing.convolution import run
from sparseattn.testing.tolerance import judge, require
from sparseattn.testing.voxels import VoxelSpec as Spec
from sparseattn.testing.voxels import make

OPS = {
    "submanifold_conv3d": submanifold_conv3d,
    "sparse_conv3d": sparse_conv3d,
    "sparse_conv_transpose3d": sparse_conv_transpose3d,
}
IMPLS = ["torch", "triton"]
DEVICES = {"torch": "cpu", "triton": "cuda" if torch.cuda.is_available() else "cpu"}
SAME = Spec(kernel=(1, 3, 2), channels=(4, 6), groups=2, shape=(3, 3, 4), share=0.4)
DEPTHWISE = replace(SAME, channels=(3, 3), groups=3)
DOWN = Spec("sparse_conv3d", (2, 3, 1), (2, 3), stride=2, padding=(0, 1, 0), shape=(4, 4, 3))
UP = Spec(
    "sparse_conv_transpose3d", (2, 3, 1), (3, 2), stride=2, padding=(0, 1, 0), shape=(2, 2, 2),
    share=0.6, out="random", out_shape=(4, 4, 3),
)  # fmt: skip
SPECS = {"same": SAME, "depthwise": DEPTHWISE, "down": DOWN, "up": UP}


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def op(spec, impl="auto"):
    return partial(OPS[spec.op], impl=impl)


def apply(inputs, convolve, **changes):
    """Call the op on tensors that may have been replaced."""
    names = ("features", "weight", "bias")
    got = {name: changes.get(name, getattr(inputs, name)) for name in names}
    x = inputs.place(got["features"])
    return convolve(x, got["weight"], got["bias"], **inputs.options).features


# -- derivatives -------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", ["torch", "reference"])
@pytest.mark.parametrize("case", SPECS)
def test_gradcheck(case, impl):
    inputs, convolve = make(SPECS[case], torch.float64), op(SPECS[case], impl)
    leaves = [t.requires_grad_() for t in (inputs.features, inputs.weight, inputs.bias)]

    def function(*tensors):
        names = ("features", "weight", "bias")
        return apply(inputs, convolve, **dict(zip(names, tensors, strict=True)))

    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)
    if impl == "reference":
        assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)


@pytest.mark.parametrize("impl", IMPLS)
def test_second_derivative_is_refused(impl):
    inputs = make(DOWN, device=DEVICES[impl])
    weight = inputs.weight.requires_grad_()
    y = apply(inputs, op(DOWN, impl))
    (dw,) = torch.autograd.grad(y.square().sum(), weight, create_graph=True)
    with pytest.raises(RuntimeError, match="twice"):
        dw.square().sum().backward()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("case", ["same", "up"])
@pytest.mark.parametrize("wanted", ["features", "weight", "bias"])
def test_gradient_of_one_input_alone(wanted, case, impl):
    inputs, convolve = make(SPECS[case], device=DEVICES[impl]), op(SPECS[case], impl)
    leaf = getattr(inputs, wanted).detach().requires_grad_()
    (found,) = torch.autograd.grad(apply(inputs, convolve, **{wanted: leaf}), leaf, inputs.dy)
    assert torch.equal(found, run(convolve, inputs)[f"d{wanted}"])


# -- equal bits --------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("case", SPECS)
def test_two_equal_runs_give_equal_bits(case, impl):
    convolve, spec = op(SPECS[case], impl), SPECS[case]
    first, second = (run(convolve, make(spec, device=DEVICES[impl])) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("other", [7.0, torch.nan, torch.inf])
@pytest.mark.parametrize("case", SPECS)
def test_a_sample_does_not_depend_on_its_batch_mates(case, other, impl):
    spec = SPECS[case]
    inputs, convolve = make(spec, device=DEVICES[impl]), op(spec, impl)
    out = convolve(inputs.place(inputs.features), inputs.weight, **inputs.options)
    mine = {"dfeatures": inputs.mask.coordinates[:, 0] == 0, "y": out.coordinates[:, 0] == 0}
    changed = replace(inputs, features=inputs.features.clone(), dy=inputs.dy.clone())
    changed.features[~mine["dfeatures"]] = changed.dy[~mine["y"]] = other
    first, second = run(convolve, inputs), run(convolve, changed)
    for name, rows in mine.items():
        assert rows.any() and torch.equal(first[name][rows], second[name][rows])
        assert not torch.equal(first[name][~rows], second[name][~rows])


@pytest.mark.parametrize("case", ["same", "down", "up"])
def test_threads_do_not_change_what_is_summed(case):
    """The torch path is right at any number of threads; one and two differ by roundings at most."""
    inputs, convolve = make(SPECS[case], torch.float64), op(SPECS[case], "torch")
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = run(convolve, inputs)
    finally:
        torch.set_num_threads(threads)
    many = run(convolve, inputs)
    require(*(judge(name, one[name], many[name], many[name]) for name in one))


@pytest.mark.parametrize("impl", IMPLS)
def test_a_pair_that_does_not_exist_never_meets_inf(impl):
    """Nothing is multiplied by a zero that stands in for a missing site."""
    inputs = make(replace(SAME, bias=False), device=DEVICES[impl])
    inputs = replace(
        inputs, dy=torch.full_like(inputs.dy, torch.inf), features=inputs.features.abs()
    )
    found = run(op(SAME, impl), inputs)
    plain = run(op(SAME, "torch"), replace(inputs, dy=torch.ones_like(inputs.dy)))
    assert torch.equal(found["dweight"] == 0, plain["dweight"] == 0)
    assert not found["dweight"].isnan().any()


@pytest.mark.parametrize("impl", IMPLS)
def test_inputs_are_left_as_they_are(impl):
    inputs = make(DOWN, device=DEVICES[impl])
    names = ("features", "weight", "bias", "dy")
    before = {name: getattr(inputs, name).clone() for name in names}
    run(op(DOWN, impl), inputs)
    assert all(torch.equal(getattr(inputs, name), before[name]) for name in names)


# -- as an operator of torch -------------------------------------------------------------------


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("case", ["same", "down"])
def test_opcheck(case, impl):
    inputs = make(replace(SPECS[case], layout="strided", dy_layout="strided"), device=DEVICES[impl])
    x, weight, groups = inputs.features, inputs.weight, SPECS[case].groups
    out = OPS[SPECS[case].op](inputs.place(x), weight, **inputs.options)
    kernel = tuple(weight.shape[2:])
    made = inputs.mask.kernel_map(
        kernel, stride=SPECS[case].stride, padding=SPECS[case].padding, out_sites=out
    )
    back, pairs = made.transposed(), (None, None, None)
    if impl == "triton":
        made, back, pairs = made.sorted_by_taps(), back.sorted_by_taps(), made.pairs()
    ops = torch.ops.sparseattn
    arguments = (x, weight, inputs.bias, made.rows, made.order, made.lists, groups, impl)
    torch.library.opcheck(ops.sparse_conv3d.default, arguments)
    there = (made.rows, made.order, made.lists)
    maps = (*there, back.rows, back.order, back.lists, *pairs)
    for needs in ((True, True, True), (False, False, True), (True, False, False)):
        arguments = (inputs.dy, x, weight, *maps, groups, impl, *needs)
        torch.library.opcheck(ops.sparse_conv3d_backward.default, arguments)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("case", ["same", "up"])
def test_compiles_whole_and_gives_the_same(case, backend, impl):
    inputs, convolve = make(SPECS[case], device=DEVICES[impl]), op(SPECS[case], impl)
    compiled = torch.compile(convolve, fullgraph=True, backend=backend)
    expected, found = run(convolve, inputs), run(compiled, make(SPECS[case], device=DEVICES[impl]))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_new_voxels_at_every_step_do_not_compile_anew(backend):
    """Twice in all: for the first number of voxels, then for any."""
    counter = CompileCounter() if backend == "eager" else None

    def step(features, coordinates, half, weight):
        x = VoxelTensor(features, coordinates, (6, 6, 6), 2)
        sites = VoxelTensor(features.new_ones((half.shape[0], 1)), half, (3, 3, 3), 2)
        x = submanifold_conv3d(submanifold_conv3d(x, weight), weight)
        down = sparse_conv3d(x, weight, stride=2, padding=1, out_sites=sites)
        return sparse_conv_transpose3d(down, weight, stride=2, padding=1, out_sites=x).to_dense()

    compiled = torch.compile(step, fullgraph=True, backend=counter or backend)
    weight = torch.randn(2, 2, 3, 3, 3, requires_grad=True)
    for count in (11, 17, 40, 80, 81):
        places = torch.ones(2, 6, 6, 6).nonzero().int()[torch.randperm(432)[:count]]
        half = torch.ones(2, 3, 3, 3).nonzero().int()[torch.randperm(54)[: 3 + count // 2]]
        arguments = (torch.randn(count, 2), places, half, weight)
        out, expected = compiled(*arguments), step(*arguments)
        assert torch.equal(out, expected)
        (found,) = torch.autograd.grad(out.square().sum(), weight)
        assert torch.equal(found, torch.autograd.grad(expected.square().sum(), weight)[0])
    assert counter is None or counter.frame_count <= 2


def test_compiles_with_sites_that_are_found_if_torch_may_count():
    inputs = make(DOWN)
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compiled = torch.compile(op(DOWN), fullgraph=True, backend="aot_eager")
        found, expected = run(compiled, make(DOWN)), run(op(DOWN), inputs)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_fake_tensors_have_the_shapes_of_real_ones():
    inputs = make(replace(DOWN, out="random", out_shape=(2, 2, 2)))
    expected = run(op(DOWN), inputs)
    with FakeTensorMode() as mode:

        def fake(x):
            features, places = mode.from_tensor(x.features), mode.from_tensor(x.coordinates)
            return VoxelTensor(features, places, x.spatial_shape, x.batch_size)

        options = inputs.options | {"out_sites": fake(inputs.options["out_sites"])}
        changed = replace(inputs.map(mode.from_tensor), mask=fake(inputs.mask), options=options)
        found = run(op(DOWN), changed)
    assert {n: (t.shape, t.stride(), t.dtype) for n, t in found.items()} == {
        n: (t.shape, t.stride(), t.dtype) for n, t in expected.items()
    }


@pytest.mark.parametrize("case", ["same", "up"])
def test_autocast_computes_in_its_dtype(case):
    inputs, convolve = make(SPECS[case]), op(SPECS[case])
    with torch.autocast("cpu", torch.bfloat16):
        found = run(convolve, replace(inputs, dy=inputs.dy.bfloat16()))
    expected = run(convolve, inputs.to(torch.bfloat16))
    assert found["y"].dtype == torch.bfloat16 and torch.equal(found["y"], expected["y"])
    for name in ("dfeatures", "dweight", "dbias"):
        assert found[name].dtype == torch.float32
        assert torch.equal(found[name], expected[name].float())


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("case", SPECS)
def test_flop_counter_counts_a_pair_for_each_tap_and_site(case, impl):
    """Of input or output, whichever has fewer sites: a tap has no more pairs."""
    inputs, convolve = make(SPECS[case], device=DEVICES[impl]), op(SPECS[case], impl)
    features, weight = inputs.features.requires_grad_(), inputs.weight.requires_grad_()
    with FlopCounterMode(display=False) as forward:
        y = apply(inputs, convolve, features=features, weight=weight)
    with FlopCounterMode(display=False) as backward:
        y.sum().backward()
    sites = min(len(features), len(y))
    assert len(y) != len(features) or case in ("same", "depthwise")
    assert forward.get_total_flops() == 2 * sites * weight.numel() > 0
    assert backward.get_total_flops() == 2 * forward.get_total_flops()


# -- errors ------------------------------------------------------------------------------------

X = VoxelTensor.from_dense(torch.ones(2, 4, 5, 5, 5), torch.arange(250).view(2, 5, 5, 5) % 4 == 0)
W = torch.randn(6, 4, 3, 3, 3)
HALF = VoxelTensor(torch.ones(0, 1), torch.ones(0, 4).int(), (3, 3, 3), 2)
WRONG = {
    "sparse_conv3d": [
        ((X.features, W), {}, TypeError,
         f"x has shape [{len(X.features)}, 4]; expected a PatchGrid or a VoxelTensor"),
        ((X, W[:, :3]), {}, ValueError,
         "weight has shape [6, 3, 3, 3, 3]; expected [C_out, C_in/groups, kx, ky, kz], "
         "C_in/groups=4 (from x)"),
        ((X, W, W[0, 0, 0, 0]), {}, ValueError,
         "bias has shape [3]; expected [C_out], C_out=6 (from weight)"),
        ((X, W.double()), {}, TypeError,
         "weight has dtype torch.float64; expected the dtype of x, dtype=torch.float32 (from x)"),
        ((X, W), {"groups": 3}, ValueError,
         "groups is 3; expected a divisor of C_in, C_in=4 (from x)"),
        ((X, W), {"stride": 0}, ValueError, "stride is 0; expected an int >= 1"),
        ((X, W), {"padding": (1, -1, 0)}, ValueError, "padding is -1; expected an int >= 0"),
        ((X, W), {"dilation": 3}, ValueError,
         "x has spatial_shape=(5, 5, 5); expected at least (7, 7, 7) (from weight, padding and "
         "dilation)"),
        ((X, W), {"out_sites": X.coordinates}, TypeError,
         f"out_sites has shape [{len(X.features)}, 4]; expected a VoxelTensor"),
        ((X, W), {"out_sites": X}, ValueError,
         "out_sites has spatial_shape=(5, 5, 5); expected (3, 3, 3) (from x, weight, stride, "
         "padding and dilation)"),
        ((X, W), {"out_sites": replace(HALF, batch_size=3)}, ValueError,
         "out_sites has batch_size=3; expected that of x, batch_size=2 (from x)"),
        ((X, W), {"out_sites": HALF.to("meta")}, ValueError,
         "out_sites is on meta; expected the device of x, device=cpu (from x)"),
        ((X, W), {"impl": "cuda"}, ValueError,
         "impl is 'cuda'; expected one of 'auto', 'triton', 'torch', 'reference'"),
        ((X.to(torch.float64), W.double()), {"impl": "triton"}, NotImplementedError,
         "impl='triton' cannot run this: dtype is float64; expected float32, float16 or bfloat16"),
    ],
    "sparse_conv_transpose3d": [
        ((None, W), {}, TypeError, "x is None (NoneType); expected a VoxelTensor"),
        ((X, W), {}, ValueError,
         "weight has shape [6, 4, 3, 3, 3]; expected [C_in, C_out/groups, kx, ky, kz], C_in=4 "
         "(from x)"),
        ((X, W.mT[:4, :0]), {}, ValueError,
         "weight has shape [4, 0, 3, 3, 3]; expected taps, and C_out of 1 or more"),
        ((X, W[:4], W[0, 0, 0, 0]), {"groups": 2}, ValueError,
         "bias has shape [3]; expected [C_out], C_out=8 (from weight)"),
        ((X, W[:4]), {"output_padding": 1}, ValueError,
         "output_padding is (1, 1, 1); expected an output of (7, 7, 7) voxels, 0 to (0, 0, 0) more "
         "along each axis, and at least 1 (from x, weight, stride, padding and dilation)"),
        ((X, W[:4]), {"padding": 4}, ValueError,
         "output_padding is (0, 0, 0); expected an output of (-1, -1, -1) voxels, 0 to (0, 0, 0) "
         "more along each axis, and at least 1 (from x, weight, stride, padding and dilation)"),
        ((X, W[:4]), {"stride": 2, "out_sites": HALF}, ValueError,
         "out_sites has spatial_shape=(3, 3, 3); expected an output of (11, 11, 11) voxels, 0 to "
         "(1, 1, 1) more along each axis, and at least 1 (from x, weight, stride, padding and "
         "dilation)"),
    ],
    "submanifold_conv3d": [
        ((X.features, W), {}, TypeError,
         f"x has shape [{len(X.features)}, 4]; expected a PatchGrid or a VoxelTensor"),
        ((X, W), {"dilation": 0}, ValueError, "dilation is 0; expected an int >= 1"),
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "arguments", "options", "kind", "message"),
    [(name, *case) for name, cases in WRONG.items() for case in cases],
)
def test_errors(name, arguments, options, kind, message):
    with pytest.raises(kind, match=f"^{name}: {re.escape(message)}$"):
        OPS[name](*arguments, **options)


def test_a_wrong_coordinate_is_named_by_the_op():
    places = X.coordinates.clone()
    places[-1] = places[2]
    x = VoxelTensor(X.features, places, (5, 5, 5), 2)
    message = f"coordinates[{len(places) - 1}] is {places[2].tolist()}, as coordinates[2] is"
    with pytest.raises(ValueError, match=re.escape(message)):
        sparse_conv3d(x, W)
