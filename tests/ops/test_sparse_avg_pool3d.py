"""sparse_avg_pool3d against torch's pool of the dense volume, on every path and divisor."""

import pytest
import torch
import torch.nn.functional as F

from sparseattn import PatchGrid, PatchMask, sparse_avg_pool3d
from sparseattn.testing.patches import FEW, POOLS, PoolSpec, check_pool
from sparseattn.testing.tolerance import judge, require

TRITON_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DIVISORS = {"window": {}, "inside": {"count_include_pad": False}, "own": {"divisor_override": 7}}

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.mark.parametrize("divisor", DIVISORS)
@pytest.mark.parametrize("case", POOLS)
def test_torch_path(case, divisor):
    spec, options = POOLS[case], DIVISORS[divisor]
    check_pool(sparse_avg_pool3d, spec, spec.grid_of(torch.float32), impl="torch", **options)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", FEW)
def test_torch_path_in_other_dtypes(case, dtype):
    spec = POOLS[case]
    check_pool(sparse_avg_pool3d, spec, spec.grid_of(dtype), impl="torch")


@pytest.mark.parametrize("case", FEW)
def test_triton_path(case):
    spec, x = POOLS[case], POOLS[case].grid_of(torch.float32, TRITON_DEVICE)
    divisor = "inside" if spec.padding else "own"
    check_pool(sparse_avg_pool3d, spec, x, impl="triton", **DIVISORS[divisor])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_triton_path_in_16_bits(dtype):
    spec = POOLS["aligned-to-one-voxel"]
    check_pool(sparse_avg_pool3d, spec, spec.grid_of(dtype, TRITON_DEVICE), impl="triton")


@pytest.mark.parametrize("divisor", DIVISORS)
@pytest.mark.parametrize("case", ["aligned", "overlapping", "gaps", "empty-sample"])
def test_the_reference_is_torch_s_own_pool(case, divisor):
    spec = POOLS[case]
    x, window = spec.grid_of(torch.float64), spec.window | DIVISORS[divisor]
    dense = PatchGrid.from_dense(F.avg_pool3d(x.to_dense(), **window), x.mask)
    found = sparse_avg_pool3d(x, **window, impl="reference")
    require(judge("y", found.features, dense.features, dense.features))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_reference_takes_small_volumes_and_16_bits(dtype):
    spec = PoolSpec(1, (1, 1, 5), 1, (0, 0, 2), grid=(2, 3, 2))
    x = spec.grid_of(dtype)
    check_pool(sparse_avg_pool3d, spec, x, impl="torch")
    assert sparse_avg_pool3d(x, **spec.window, impl="reference").dtype == dtype


@pytest.mark.parametrize("impl", ["torch", "triton", "reference"])
def test_hidden_sites_are_divided_by_too(impl):
    """The divisor is the window; spconv divides by the number of active sites."""
    mask = PatchMask.from_mask(torch.tensor([True, False]).view(1, 1, 1, 2))
    x = PatchGrid(torch.full((1, 1, 1, 2, 1), 6.0), mask)
    options = {"kernel_size": (1, 1, 3), "stride": 1, "padding": (0, 0, 1), "impl": impl}
    assert sparse_avg_pool3d(x, **options).features.flatten().tolist() == [4.0, 4.0]
    found = sparse_avg_pool3d(x, count_include_pad=False, **options)
    assert found.features.flatten().tolist() == [6.0, 4.0]
