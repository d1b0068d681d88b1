"""sparse_conv_transpose3d against the dense one x mask: every result and gradient, by the rule.

What it shares with sparse_conv3d, kernels, maps, checks and promises, is tested with that.
"""

from functools import partial

import pytest
import torch

from sparseattn import VoxelTensor, sparse_conv3d, sparse_conv_transpose3d
from sparseattn.testing.convolution import check
from sparseattn.testing.voxels import VoxelSpec, make

TRITON_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

pytestmark = pytest.mark.usefixtures("poisoned_memory")

Transposed = partial(VoxelSpec, "sparse_conv_transpose3d", stride=2, padding=1)
UP = {"shape": (3, 3, 4), "out": "random", "out_shape": (5, 6, 7), "share": 0.4}
CASES = {
    **{f"transposed-k{k}": Transposed(k, shape=(3, 3, 4)) for k in (1, 2, 3, 5)},
    "transposed-dilated": Transposed(dilation=2, output_padding=1, shape=(3, 3, 4)),
    "transposed-three-sizes": Transposed((2, 1, 3), stride=(2, 1, 3), padding=(0, 0, 1)),
    "inverse": Transposed(**UP),
    "inverse-k2": Transposed(2, padding=0, shape=(3, 3, 4), out="random", out_shape=(6, 6, 8)),
    "inverse-groups": Transposed(channels=(6, 10), groups=2, **UP),
    "inverse-depthwise": Transposed(channels=(6, 6), groups=6, **UP),
    "empty-sample-transposed": Transposed(batch=3, share="ragged", shape=(3, 3, 4)),
}
TRITON_CASES = {
    "transposed": Transposed((1, 2, 3), batch=1, shape=(2, 3, 2)),
    "inverse": Transposed((3, 1, 2), **UP | {"padding": (1, 0, 0), "out_shape": (5, 5, 8)}),
}


def compare(spec, impl, dtype=torch.float32, device="cpu"):
    convolve = partial(sparse_conv_transpose3d, impl=impl)
    reference = partial(sparse_conv_transpose3d, impl="reference")
    check(convolve, reference, make(spec, dtype, device))


@pytest.mark.parametrize("case", CASES)
def test_torch_path(case):
    compare(CASES[case], "torch")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("case", ["inverse", "transposed-k2"])
def test_torch_path_in_other_dtypes(case, dtype):
    compare(CASES[case], "torch", dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", TRITON_CASES)
def test_triton_path(case, dtype):
    # the interpreter's own bfloat16 arithmetic is wrong; the launcher raises inputs to float32
    compare(TRITON_CASES[case], "triton", dtype, TRITON_DEVICE)


def test_small_workspaces_give_the_same(monkeypatch):
    from sparseattn.ops.blocked import sparse_conv3d as blocked

    monkeypatch.setattr(blocked, "WORKSPACE", 1)  # one site at a time
    compare(CASES["inverse"], "torch")


def test_ways_down_and_up_use_one_map():
    x = VoxelTensor.from_dense(torch.randn(1, 2, 8, 8, 8), torch.rand(1, 8, 8, 8) < 0.2)
    weight = torch.randn(2, 2, 3, 3, 3, requires_grad=True)
    down = sparse_conv3d(x, weight, stride=2, padding=1)
    again = sparse_conv3d(x, weight, stride=2, padding=1)
    up = sparse_conv_transpose3d(down, weight, stride=2, padding=1, out_sites=x)
    assert again.coordinates is down.coordinates and up.made is x.made
    assert [made.what for made in x.made if made.what[0] == "map"] == [("map", False)]
    assert torch.equal(up.coordinates, x.coordinates)
