"""sparse_max_pool3d against torch's pool of the dense volume, on every path, ties and NaN too."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from sparseattn import PatchGrid, PatchMask, sparse_max_pool3d
from sparseattn.testing.patches import FEW, POOLS, check_pool, run_pool

TRITON_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IMPLS = ["torch", "triton", "reference"]

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", POOLS)
def test_torch_path(case, dtype):
    spec = POOLS[case]
    check_pool(sparse_max_pool3d, spec, spec.grid_of(dtype), impl="torch")


@pytest.mark.parametrize("case", [*FEW, "no-patches"])
def test_triton_path(case):
    spec = POOLS[case]
    check_pool(sparse_max_pool3d, spec, spec.grid_of(torch.float32, TRITON_DEVICE), impl="triton")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_triton_path_in_16_bits(dtype):
    spec = POOLS["aligned-to-one-voxel"]
    check_pool(sparse_max_pool3d, spec, spec.grid_of(dtype, TRITON_DEVICE), impl="triton")


@pytest.mark.parametrize("case", ["aligned", "overlapping"])
def test_small_workspaces_give_the_same(case, monkeypatch):
    from sparseattn.ops.blocked import sparse_pool3d as blocked

    monkeypatch.setattr(blocked, "WORKSPACE", 1)  # one patch at a time
    check_pool(sparse_max_pool3d, POOLS[case], POOLS[case].grid_of(torch.float32), impl="torch")


@pytest.mark.parametrize("impl", IMPLS)
def test_hidden_sites_count_as_zero_and_the_border_does_not(impl):
    """Dense pooling of a volume with zeros; spconv starts every maximum at 0 (its issue 754)."""
    mask = PatchMask.from_mask(torch.tensor([True, False]).view(1, 1, 1, 2))
    x = PatchGrid(torch.full((1, 1, 1, 4, 1), -3.0), mask)
    inside = sparse_max_pool3d(x, (1, 1, 2), impl=impl)
    assert inside.features.flatten().tolist() == [-3.0, -3.0]
    across = sparse_max_pool3d(x, (1, 1, 3), 1, (0, 0, 1), impl=impl)
    assert across.features.flatten().tolist() == [-3.0, -3.0, -3.0, 0.0]


@pytest.mark.parametrize("impl", IMPLS)
def test_what_hidden_sites_hold_does_not_matter(impl):
    mask = PatchMask.from_scores(torch.rand(2, 2, 1, 2), 2)
    hidden = ~mask.to_dense(2)[:, None]
    volume = torch.randn(2, 3, 4, 2, 4)
    pool = partial(sparse_max_pool3d, kernel_size=3, stride=2, padding=1, impl=impl)
    clean = pool(PatchGrid.from_dense(volume.masked_fill(hidden, 0), mask))
    dirty = pool(PatchGrid.from_dense(volume.masked_fill(hidden, torch.nan), mask))
    assert torch.equal(clean.features, dirty.features)
    expected = F.max_pool3d(volume.masked_fill(hidden, 0), 3, 2, 1)
    assert torch.equal(clean.to_dense(), expected * mask.to_dense()[:, None])


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("case", ["aligned", "overlapping-one-axis"])
def test_nan_and_infinities_as_in_torch(case, impl):
    spec = POOLS[case]
    x = spec.grid_of(torch.float32, TRITON_DEVICE)
    features = x.features.clone()
    features.flatten()[::17], features.flatten()[1::19] = torch.nan, torch.inf
    features[0] = -torch.inf
    found, expected = (
        run_pool(sparse_max_pool3d, x.with_features(features), impl=i, **spec.window)
        for i in (impl, "reference")
    )
    assert torch.equal(found["y"].nan_to_num(nan=99), expected["y"].nan_to_num(nan=99))
    finite = slice(1, None)  # torch, too, leaves open who gets the gradient of -inf alone
    if case == "aligned":
        assert torch.equal(found["dfeatures"][finite], expected["dfeatures"][finite])
