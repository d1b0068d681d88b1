"""densify against torch.where on the dense volume: values, both gradients, on every path."""

import pytest
import torch

from sparseattn import PatchGrid, PatchMask, densify
from sparseattn.testing.convolution import ConvSpec as Spec
from sparseattn.testing.convolution import make
from sparseattn.testing.tolerance import judge, require

TRITON_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IMPLS = ["torch", "triton"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
BOTH = [
    (impl, dtype)
    for impl in IMPLS
    for dtype in DTYPES
    if (impl, dtype) != ("triton", torch.float64)
]

pytestmark = pytest.mark.usefixtures("poisoned_memory")

CASES = {
    "p2": Spec(2),
    "three-sizes": Spec((1, 2, 3)),
    "p1": Spec(1, grid=(3, 1, 5)),
    "channels-67": Spec(2, channels=(67, 1), batch=1, grid=(2, 1, 2), keep=2),
    "many-tiles": Spec((4, 8, 9), channels=(5, 1), grid=(2, 2, 2), batch=1, keep=1),
    "empty-sample": Spec(2, batch=3, keep="ragged"),
    "full": Spec(2, keep=12),
    "no-patches": Spec(2, keep=0),
    "no-samples": Spec(2, batch=0),
    "strided": Spec(3, layout="strided"),
}
LAYOUTS = {
    "channels last": lambda dy: dy.contiguous(memory_format=torch.channels_last_3d),
    "channels first": lambda dy: dy.contiguous(),
    "scalar": lambda dy: dy.new_ones(()).expand(dy.shape),
}


def run(x, token, dy, impl):
    features, token = x.features.detach().requires_grad_(), token.detach().requires_grad_()
    y = densify(x.with_features(features), token, impl=impl)
    dx, dtoken = torch.autograd.grad(y, (features, token), dy.to(y.dtype))
    return {"y": y.detach(), "dx": dx, "dtoken": dtoken}


def inputs(case, dtype=torch.float32, device="cpu"):
    made = make(CASES[case], dtype, device)
    x = PatchGrid(made.features, made.mask)
    token, shape = torch.randn(x.channels), (x.batch, x.channels, *x.spatial_shape)
    return x, token.to(x.features), torch.randn(shape).to(x.features)


@pytest.mark.parametrize(("impl", "dtype"), BOTH)
@pytest.mark.parametrize("case", CASES)
def test_both_paths(case, impl, dtype):
    x, token, dy = inputs(case, dtype, TRITON_DEVICE if impl == "triton" else "cpu")
    found = run(x, token, dy, impl)
    truth = run(x.to(torch.float64), token.double(), dy.double(), "reference")
    naive = run(x.to(torch.float32), token.float(), dy.float(), "reference")
    hidden = ~x.mask.to_dense(x.patch)[:, None]
    size = (dy.double().square() * hidden).sum((0, 2, 3, 4)).sqrt()
    assert torch.equal(found["y"].double(), truth["y"])
    assert torch.equal(found["dx"].double(), truth["dx"])
    require(judge("dtoken", found["dtoken"], naive["dtoken"].to(dtype), truth["dtoken"], size))
    assert {t.dtype for t in found.values()} == {dtype}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("impl", IMPLS)
def test_gradients_of_any_layout(impl, layout):
    x, token, dy = inputs("p2", device=TRITON_DEVICE if impl == "triton" else "cpu")
    dy = LAYOUTS[layout](dy)
    expected, found = run(x, token, dy.clone().contiguous(), impl), run(x, token, dy, impl)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("impl", IMPLS)
def test_what_arrives_at_active_voxels_never_reaches_the_token(impl):
    x, token, dy = inputs("p2", device=TRITON_DEVICE if impl == "triton" else "cpu")
    active = x.mask.to_dense(x.patch)[:, None]
    found = run(x, token, dy.masked_fill(active, torch.nan), impl)
    assert torch.equal(found["dtoken"], run(x, token, dy.masked_fill(active, 7), impl)["dtoken"])
    assert found["dx"].isnan().all()


def test_tokens_in_the_form_of_the_released_models():
    x, token, _ = inputs("p2")
    assert torch.equal(densify(x, token.view(1, -1, 1, 1, 1)), densify(x, token))
    assert torch.equal(densify(x, torch.zeros_like(token)), x.to_dense())
    assert densify(x, token).is_contiguous(memory_format=torch.channels_last_3d)


@pytest.mark.parametrize(
    ("token", "kind", "message"),
    [
        (None, TypeError, "token is None .*expected a torch.Tensor"),
        (torch.zeros(4), ValueError, r"token has shape \[4\]; expected \[C\] or \[1, C, 1, 1, 1\]"),
        (torch.zeros(3).double(), TypeError, "token has dtype torch.float64; expected the dtype"),
        (torch.zeros(3, device="meta"), ValueError, "token is on meta"),
    ],
)
def test_errors(token, kind, message):
    mask = PatchMask.from_scores(torch.rand(1, 2, 2, 2), 3)
    with pytest.raises(kind, match=f"^densify: {message}"):
        densify(PatchGrid(torch.zeros(3, 2, 2, 2, 3), mask), token)
