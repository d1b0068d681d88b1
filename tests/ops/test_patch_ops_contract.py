"""Promises of pooling and densify: derivatives, equal bits, compile, batch mates, errors."""

import re
from functools import partial

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from sparseattn import PatchGrid, PatchMask, densify, sparse_avg_pool3d, sparse_max_pool3d
from sparseattn.ops.sparse_pool3d import OUTSIDE

IMPLS = ["torch", "triton"]
DEVICES = {"torch": "cpu", "triton": "cuda" if torch.cuda.is_available() else "cpu"}
ALIGNED = {"kernel_size": (1, 2, 2)}
ACROSS = {"kernel_size": (1, 3, 1), "stride": 1, "padding": (0, 1, 0)}
OPS = {
    "max": partial(sparse_max_pool3d, **ALIGNED),
    "max-across": partial(sparse_max_pool3d, **ACROSS),
    "avg": partial(sparse_avg_pool3d, **ALIGNED),
    "avg-across": partial(sparse_avg_pool3d, count_include_pad=False, **ACROSS),
    "densify": lambda x, impl: densify(x, x.features.detach().flatten(0, 3).mean(0), impl=impl),
}


def values_of(y):
    return y.features if isinstance(y, PatchGrid) else y


def grid(dtype=torch.float32, device="cpu"):
    mask = PatchMask.from_scores(torch.rand(2, 2, 2, 1), 3)
    return PatchGrid(torch.randn(6, 1, 2, 2, 3, dtype=dtype), mask).to(device)


def run(op, x):
    features = x.features.detach().requires_grad_()
    y = values_of(op(x.with_features(features)))
    sent = torch.linspace(-1, 1, y.numel()).view(y.shape).to(y)
    return y.detach(), torch.autograd.grad(y, features, sent)[0]


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("impl", ["torch", "reference"])
@pytest.mark.parametrize("name", OPS)
def test_gradcheck(name, impl):
    x = grid(torch.float64)
    token = torch.randn(3, dtype=torch.float64, requires_grad=True)

    def function(features, token):
        if name == "densify":
            return densify(x.with_features(features), token, impl=impl)
        return OPS[name](x.with_features(features), impl=impl).features + 0 * token.sum()

    assert torch.autograd.gradcheck(function, (x.features.requires_grad_(), token))


@pytest.mark.parametrize("name", OPS)
def test_second_derivative_is_refused(name):
    x = grid()
    features = x.features.requires_grad_()
    y = values_of(OPS[name](x.with_features(features), impl="torch"))
    (dx,) = torch.autograd.grad(y.square().sum(), features, create_graph=True)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        dx.sum().backward()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", OPS)
def test_equal_bits_and_no_batch_mates(name, impl):
    if name == "densify":
        op = lambda x, impl: densify(x, torch.ones(3).to(x.features), impl=impl)  # noqa: E731
    else:
        op = OPS[name]
    x = grid(device=DEVICES[impl])
    op = partial(op, impl=impl)
    first, second = run(op, x), run(op, x)
    assert all(map(torch.equal, first, second))
    changed = x.features.clone()
    changed[3:] = torch.nan
    mine = 1 if name == "densify" else 3
    assert torch.equal(run(op, x.with_features(changed))[0][:mine], first[0][:mine])
    assert torch.equal(x.features[3:], x.features[3:])  # nothing was written into the input


@pytest.mark.parametrize("impl", IMPLS)
def test_opcheck(impl):
    x = grid(device=DEVICES[impl])
    table, ops = x.mask.table, torch.ops.sparseattn
    neighbours = x.mask.neighbour_rows((0, 1, 0), OUTSIDE)
    window = ([1, 2, 2], [1, 3, 1], [1, 1, 1], [0, 1, 0])
    for is_max in (True, False):
        options = (neighbours, None, 0.5, *window, is_max, impl)
        torch.library.opcheck(ops.sparse_pool3d.default, (x.features, *options))
        y, taps = ops.sparse_pool3d.default(x.features, *options)
        torch.library.opcheck(ops.sparse_pool3d_backward.default, (y, taps, *options))
    token = torch.randn(3).to(x.features)
    torch.library.opcheck(ops.densify.default, (x.features, token, table, impl))
    dy = ops.densify.default(x.features, token, table, impl)
    options = (table, list(x.features.shape), impl)
    torch.library.opcheck(ops.densify_backward.default, (dy, *options))


@pytest.mark.parametrize("impl", IMPLS)
def test_one_graph_serves_a_new_mask_at_every_step(impl):
    counter = CompileCounter()

    def step(volume, scores, token):
        x = PatchGrid.from_dense(volume, PatchMask.from_scores(scores, 2))
        x = sparse_max_pool3d(x, 2, impl=impl)
        x = sparse_avg_pool3d(x, 3, 1, 1, count_include_pad=False, impl=impl)
        return densify(x, token, impl=impl)

    compiled = torch.compile(step, fullgraph=True, backend=counter)
    token = torch.randn(2, requires_grad=True, device=DEVICES[impl])
    for _ in range(3):
        volume, scores = torch.randn(1, 2, 4, 4, 2), torch.rand(1, 2, 2, 1)
        volume, scores = volume.to(token).requires_grad_(), scores.to(token)
        found, expected = compiled(volume, scores, token), step(volume, scores, token)
        assert torch.equal(found, expected)
        for one, two in zip(
            torch.autograd.grad(found.square().sum(), (volume, token)),
            torch.autograd.grad(expected.square().sum(), (volume, token)),
            strict=True,
        ):
            assert torch.equal(one, two)
    assert counter.frame_count == 1


def test_autocast_of_densify():
    x = grid()
    with torch.autocast("cpu", torch.bfloat16):
        assert densify(x, torch.ones(3)).dtype == torch.bfloat16


MASK = PatchMask.from_mask(torch.ones(1, 1, 1, 2, dtype=torch.bool))
X = PatchGrid(torch.randn(2, 4, 4, 4, 3), MASK)
SAME_SIZE = "expected 2 * padding < kernel_size <= stride + 2 * padding"
WRONG = [
    ((X.features, 2), {}, TypeError, "x has shape [2, 4, 4, 4, 3]; expected a PatchGrid"),
    ((X, 2.0), {}, TypeError, "kernel_size is 2.0 (float); expected an int >= 1 or three of them"),
    ((X, 0), {}, ValueError, "kernel_size is 0; expected an int >= 1"),
    ((X, 2, 0), {}, ValueError, "stride is 0; expected an int >= 1"),
    ((X, 2, 2, -1), {}, ValueError, "padding is -1; expected an int >= 0"),
    ((X, 3), {}, ValueError, "stride is (3, 3, 3); expected divisors of the patch"),
    ((X, 8, (8, 1, 1)), {}, ValueError, "stride is (8, 1, 1); expected divisors of the patch"),
    ((X, 3, 2), {}, ValueError, SAME_SIZE),
    ((X, 2, 2, 1), {}, ValueError, SAME_SIZE),
    ((X, 67, 1, 33), {}, ValueError, "kernel_size is (67, 67, 67); expected at most 32767 taps"),
    ((X, 2), {"impl": "cuda"}, ValueError, "impl is 'cuda'"),
    ((X.to(torch.float64), 2), {"impl": "triton"}, NotImplementedError, "dtype is float64"),
]


@pytest.mark.parametrize("op", [sparse_max_pool3d, sparse_avg_pool3d])
@pytest.mark.parametrize(("arguments", "options", "kind", "message"), WRONG)
def test_errors_of_pools(op, arguments, options, kind, message):
    with pytest.raises(kind, match=f"^{op.__name__}: .*{re.escape(message)}"):
        op(*arguments, **options)


@pytest.mark.parametrize(
    ("option", "kind"),
    [({"count_include_pad": 1}, TypeError), ({"divisor_override": 0}, ValueError)],
)
def test_errors_of_the_average(option, kind):
    with pytest.raises(kind, match=f"^sparse_avg_pool3d: {next(iter(option))} is"):
        sparse_avg_pool3d(X, 2, **option)
