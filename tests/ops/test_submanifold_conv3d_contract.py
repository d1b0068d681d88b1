"""What convolutions of patches promise: derivatives, equal bits, compile, autocast, errors."""

import re
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from sparseattn import PatchGrid, PatchMask, VoxelTensor, sparse_conv3d, submanifold_conv3d
from sparseattn.structures.site_lookup import Window
from sparseattn.testing.convolution import ConvSpec as Spec
from sparseattn.testing.convolution import make, run

IMPLS = ["torch", "triton"]
DEVICES = {"torch": "cpu", "triton": "cuda" if torch.cuda.is_available() else "cpu"}
SMALL = Spec((1, 2, 2), (1, 3, 2), channels=(4, 6), groups=2, grid=(2, 2, 1), keep=3)
DEPTHWISE = replace(SMALL, channels=(3, 3), groups=3)
STRIDED = replace(SMALL, stride=(1, 2, 1), padding=(0, 1, 0), kernel=(1, 3, 1))
STRIDED_DEPTHWISE = replace(STRIDED, channels=(3, 3), groups=3)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def op(inputs, impl="auto"):
    convolve = sparse_conv3d if "stride" in inputs.options else submanifold_conv3d
    return partial(convolve, impl=impl)


def apply(inputs, impl, **changes):
    """Call the op on tensors that may have been replaced."""
    names = ("features", "weight", "bias")
    got = {name: changes.get(name, getattr(inputs, name)) for name in names}
    x = inputs.place(got["features"])
    return op(inputs, impl)(x, got["weight"], got["bias"], **inputs.options).features


# -- derivatives -------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", ["torch", "reference"])
@pytest.mark.parametrize(
    "spec", [SMALL, DEPTHWISE, STRIDED, STRIDED_DEPTHWISE, Spec(1, grid=(2, 2, 2), keep=3)]
)
def test_gradcheck(spec, impl):
    inputs = make(spec, torch.float64)
    leaves = [t.requires_grad_() for t in (inputs.features, inputs.weight, inputs.bias)]
    names = ("features", "weight", "bias")

    def function(*tensors):
        return apply(inputs, impl, **dict(zip(names, tensors, strict=True)))

    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)
    if impl == "reference":
        assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)


@pytest.mark.parametrize("impl", IMPLS)
def test_second_derivative_is_refused(impl):
    inputs = make(SMALL, device=DEVICES[impl])
    weight = inputs.weight.requires_grad_()
    y = apply(inputs, impl)
    (dw,) = torch.autograd.grad(y.square().sum(), weight, create_graph=True)
    with pytest.raises(RuntimeError, match="twice"):
        dw.square().sum().backward()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("spec", [SMALL, STRIDED])
@pytest.mark.parametrize("wanted", ["features", "weight", "bias"])
def test_gradient_of_one_input_alone(wanted, spec, impl):
    inputs = make(spec, device=DEVICES[impl])
    leaf = getattr(inputs, wanted).detach().requires_grad_()
    (gradient,) = torch.autograd.grad(apply(inputs, impl, **{wanted: leaf}), leaf, inputs.dy)
    assert torch.equal(gradient, run(op(inputs, impl), inputs)[f"d{wanted}"])


# -- equal bits --------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    "spec",
    [SMALL, DEPTHWISE, STRIDED, STRIDED_DEPTHWISE, Spec((5, 5, 3), (1, 1, 2), batch=1, keep=2)],
)
def test_two_equal_runs_give_equal_bits(spec, impl):
    inputs = make(spec, device=DEVICES[impl])
    convolve = op(inputs, impl)
    first, second = run(convolve, inputs), run(convolve, inputs)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("other", [7.0, torch.nan, torch.inf])
@pytest.mark.parametrize("spec", [SMALL, DEPTHWISE, STRIDED])
def test_a_sample_does_not_depend_on_its_batch_mates(spec, other, impl):
    inputs = make(spec, device=DEVICES[impl])
    changed = replace(inputs, features=inputs.features.clone(), dy=inputs.dy.clone())
    changed.features[3:], changed.dy[3:] = other, other
    first, second = (run(op(inputs, impl), given) for given in (inputs, changed))
    for name in ("y", "dfeatures"):
        assert torch.equal(first[name][:3], second[name][:3])
        assert not torch.equal(first[name][3:], second[name][3:])


@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
@pytest.mark.parametrize("spec", [SMALL, DEPTHWISE, STRIDED, Spec(1, (1, 3, 1), grid=(2, 2, 1))])
def test_what_an_infinite_gradient_makes_of_the_weights(spec, impl):
    """Triton sums pairs that exist; the others multiply zeros of missing sites, too, as dense."""
    inputs = make(replace(spec, keep=1, batch=1), device=DEVICES.get(impl, "cpu"))
    inputs = replace(inputs, features=inputs.features.abs())
    plain = run(op(inputs, "torch"), replace(inputs, dy=torch.ones_like(inputs.dy)))["dweight"]
    inputs = replace(inputs, dy=torch.full_like(inputs.dy, torch.inf))
    found = run(op(inputs, impl), inputs)["dweight"]
    if impl == "triton":
        assert torch.equal(found == 0, plain == 0) and not found.isnan().any()
    else:
        assert not found.isfinite().any()


@pytest.mark.parametrize("impl", IMPLS)
def test_inputs_are_left_as_they_are(impl):
    inputs = make(SMALL, device=DEVICES[impl])
    names = ("features", "weight", "bias", "dy")
    before = {name: getattr(inputs, name).clone() for name in names}
    run(partial(submanifold_conv3d, impl=impl), inputs)
    assert all(torch.equal(getattr(inputs, name), before[name]) for name in names)


# -- as an operator of torch -------------------------------------------------------------------


TINY = replace(SMALL, patch=(1, 1, 2), kernel=(1, 1, 3))


@pytest.mark.parametrize("step", [1, 2])
@pytest.mark.parametrize(
    ("impl", "layout"), [("torch", "contiguous"), ("torch", "strided"), ("triton", "strided")]
)
def test_opcheck(layout, impl, step):
    spec = replace(TINY, layout=layout, dy_layout=layout, stride=(1, 1, step), padding=(0, 0, 1))
    inputs = make(spec, device=DEVICES[impl])
    mask, window = inputs.mask, Window((1, 1, 3), (1, 1, step), (0, 0, 1), (1, 1, 1))
    arguments = (inputs.features, mask.neighbours, mask.order, inputs.weight)
    options = ([1, 1, 1], window.pack(), 2, impl)
    ops = torch.ops.sparseattn
    torch.library.opcheck(ops.patch_conv3d.default, (*arguments, inputs.bias, *options))
    for needs in ((True, True, True), (False, False, True), (True, False, False)):
        torch.library.opcheck(
            ops.patch_conv3d_backward.default, (inputs.dy, *arguments, *options, *needs)
        )


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("spec", [SMALL, STRIDED])
def test_compiles_whole_and_gives_the_same(spec, backend, impl):
    inputs = make(spec, device=DEVICES[impl])
    convolve = op(inputs, impl)
    compiled = torch.compile(convolve, fullgraph=True, backend=backend)
    expected, found = run(convolve, inputs), run(compiled, inputs)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_one_graph_serves_a_new_mask_at_every_step():
    counter = CompileCounter()

    def step(volume, scores, weight):
        x = PatchGrid.from_dense(volume, PatchMask.from_scores(scores, 3))
        x = submanifold_conv3d(submanifold_conv3d(x, weight), weight, dilation=2)
        return sparse_conv3d(x, weight, stride=2, padding=1).to_dense()

    compiled = torch.compile(step, fullgraph=True, backend=counter)
    weight = torch.randn(2, 2, 3, 3, 3, requires_grad=True)
    for _ in range(4):
        arguments = (torch.randn(2, 2, 4, 4, 4), torch.rand(2, 2, 2, 2), weight)
        out, expected = compiled(*arguments), step(*arguments)
        assert torch.equal(out, expected)
        (found,) = torch.autograd.grad(out.square().sum(), weight)
        assert torch.equal(found, torch.autograd.grad(expected.square().sum(), weight)[0])
    assert counter.frame_count == 1


@pytest.mark.parametrize("spec", [SMALL, STRIDED])
def test_fake_tensors_have_the_shapes_of_real_ones(spec):
    inputs = make(spec)
    with FakeTensorMode() as mode:
        fake = replace(inputs.map(mode.from_tensor), mask=inputs.mask.map(mode.from_tensor))
        found = run(op(inputs), fake)
    expected = run(op(inputs), inputs)
    assert {n: (t.shape, t.stride(), t.dtype) for n, t in found.items()} == {
        n: (t.shape, t.stride(), t.dtype) for n, t in expected.items()
    }


def test_autocast_computes_in_its_dtype():
    inputs = make(SMALL)
    with torch.autocast("cpu", torch.bfloat16):
        found = run(submanifold_conv3d, replace(inputs, dy=inputs.dy.bfloat16()))
    expected = run(submanifold_conv3d, inputs.to(torch.bfloat16))
    assert found["y"].dtype == torch.bfloat16 and torch.equal(found["y"], expected["y"])
    for name in ("dfeatures", "dweight", "dbias"):
        assert found[name].dtype == torch.float32
        assert torch.equal(found[name], expected[name].float())


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("spec", [SMALL, STRIDED])
def test_flop_counter_counts_all_taps(spec, impl):
    inputs = make(spec, device=DEVICES[impl])
    features, weight = inputs.features.requires_grad_(), inputs.weight.requires_grad_()
    sites, taps = inputs.dy.shape[:4].numel(), 1 * 3 * (2 if spec is SMALL else 1)
    with FlopCounterMode(display=False) as forward:
        y = apply(inputs, impl, features=features, weight=weight)
    with FlopCounterMode(display=False) as backward:
        y.sum().backward()
    assert forward.get_total_flops() == 2 * sites * taps * 4 * 6 // 2
    assert backward.get_total_flops() == 2 * forward.get_total_flops()
    with FlopCounterMode(display=False) as half:
        apply(inputs, impl, weight=weight.detach(), features=features).sum().backward()
    assert half.get_total_flops() == 2 * forward.get_total_flops()


# -- errors ------------------------------------------------------------------------------------

MASK = PatchMask.from_mask(torch.ones(1, 1, 1, 2, dtype=torch.bool))
X = PatchGrid(torch.randn(2, 2, 2, 2, 4), MASK)
W = torch.randn(6, 4, 3, 3, 3)
OTHER = VoxelTensor(torch.ones(0, 1), torch.ones(0, 4).int(), (1, 1, 1), 1)
WRONG = [
    ((X.features, W), {}, TypeError,
     "x has shape [2, 2, 2, 2, 4]; expected a PatchGrid or a VoxelTensor"),
    ((X, None), {}, TypeError, "weight is None (NoneType); expected a torch.Tensor"),
    ((X, W[:, :3]), {}, ValueError,
     "weight has shape [6, 3, 3, 3, 3]; expected [C_out, C_in/groups, kx, ky, kz], "
     "C_in/groups=4 (from x)"),
    ((X, W[0]), {}, ValueError,
     "weight has shape [4, 3, 3, 3]; expected [C_out, C_in/groups, kx, ky, kz], "
     "C_in/groups=4 (from x)"),
    ((X, W[..., :0]), {}, ValueError,
     "weight has shape [6, 4, 3, 3, 0]; expected taps, and C_out a multiple of groups, groups=1"),
    ((X, W[:5, :2]), {"groups": 2}, ValueError,
     "weight has shape [5, 2, 3, 3, 3]; expected taps, and C_out a multiple of groups, groups=2"),
    ((X, W, W[0, 0, 0, 0]), {}, ValueError,
     "bias has shape [3]; expected [C_out], C_out=6 (from weight)"),
    ((X, W.double()), {}, TypeError,
     "weight has dtype torch.float64; expected the dtype of x, dtype=torch.float32 (from x)"),
    ((X, W.int()), {}, TypeError,
     "weight has dtype torch.int32; expected torch.float32 or torch.float16 or torch.bfloat16 or "
     "torch.float64"),
    ((X, W.to("meta")), {}, ValueError,
     "weight is on meta; expected the device of x, device=cpu (from x)"),
    ((X, W), {"groups": 3}, ValueError,
     "groups is 3; expected a divisor of C_in, C_in=4 (from x)"),
    ((X, W), {"groups": 0}, ValueError, "groups is 0; expected an int >= 1"),
    ((X, W), {"groups": 1.0}, TypeError, "groups is 1.0 (float); expected an int >= 1"),
    ((X, W), {"dilation": 0}, ValueError, "dilation is 0; expected an int >= 1"),
    ((X, W), {"dilation": (1, 2)}, TypeError,
     "dilation is (1, 2) (tuple); expected an int >= 1 or three of them"),
    ((X, W), {"impl": "cuda"}, ValueError,
     "impl is 'cuda'; expected one of 'auto', 'triton', 'torch', 'reference'"),
    ((X.to(torch.float64), W.double()), {"impl": "triton"}, NotImplementedError,
     "impl='triton' cannot run this: dtype is float64; expected float32, float16 or bfloat16"),
]  # fmt: skip


WRONG_STRIDED = [
    ((X, W), {"stride": 3}, ValueError,
     "stride is (3, 3, 3); expected divisors of the patch, patch=(2, 2, 2) (from x): the output "
     "has patches again"),
    ((X, W), {"stride": 2}, ValueError,
     "weight has kernel_size=(3, 3, 3), dilated, with stride=(2, 2, 2) and padding=(0, 0, 0); "
     "expected 2 * padding < kernel_size <= stride + 2 * padding along each axis: the volume of "
     "the output has 1 / stride of the voxels then"),
    ((X, W), {"stride": 2, "padding": 2, "dilation": (2, 1, 2)}, ValueError,
     "weight has kernel_size=(5, 3, 5), dilated, with stride=(2, 2, 2) and padding=(2, 2, 2); "
     "expected 2 * padding < kernel_size <= stride + 2 * padding along each axis: the volume of "
     "the output has 1 / stride of the voxels then"),
    ((X, W), {"stride": 2, "padding": 1, "out_sites": OTHER}, ValueError,
     "out_sites is a VoxelTensor; expected None, since the output has the patches of x, a "
     "PatchGrid"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "options", "kind", "message"), WRONG_STRIDED)
def test_errors_of_strides(arguments, options, kind, message):
    with pytest.raises(kind, match=f"^sparse_conv3d: {re.escape(message)}$"):
        sparse_conv3d(*arguments, **options)


@pytest.mark.parametrize(("arguments", "options", "kind", "message"), WRONG)
def test_errors(arguments, options, kind, message):
    with pytest.raises(kind, match=f"^submanifold_conv3d: {re.escape(message)}$"):
        submanifold_conv3d(*arguments, **options)
