"""Layers on voxels against torch's layers, and against the same layers on patches of one voxel."""

import copy

import pytest
import torch
from torch import nn

from sparseattn import PatchGrid, PatchMask, VoxelTensor
from sparseattn.layers.sparse_conv3d import SparseConv3d, SparseConvTranspose3d, load_spconv
from sparseattn.layers.sparse_norm import (
    SparseBatchNorm,
    SparseGroupNorm,
    SparseInstanceNorm,
    SparseLayerNorm,
    SparseSyncBatchNorm,
)
from sparseattn.layers.submanifold_conv3d import SubmanifoldConv3d
from sparseattn.structures.voxel_tensor import read
from sparseattn.testing.tolerance import judge, require

ACTIVE = torch.rand(3, 5, 4, 6) < torch.tensor([0.0, 0.3, 0.6]).view(3, 1, 1, 1)
MASK = PatchMask.from_mask(ACTIVE)


def patches(channels, dtype=torch.float32):
    features = torch.randn(MASK.num_patches, 1, 1, 1, channels) * 2 + torch.arange(channels)
    return PatchGrid(features.to(dtype), MASK)


def voxels_of(x, order):
    places = torch.stack(x.mask.coordinates(), 1).int()[order]
    return VoxelTensor(x.features.flatten(0, 3)[order], places, x.spatial_shape, x.batch)


NORMS = {
    "batch": lambda: SparseBatchNorm(6),
    "sync": lambda: SparseSyncBatchNorm(6),
    "layer": lambda: SparseLayerNorm(6, eps=1e-6),
    "group": lambda: SparseGroupNorm(3, 6),
    "instance": lambda: SparseInstanceNorm(6, affine=True),
    "plain": lambda: SparseInstanceNorm(6),
}


def results(module, x, dy, rows):
    features = x.features.detach().requires_grad_()
    y = module(x.with_features(features)).features
    found = torch.autograd.grad(y, [features, *module.parameters()], dy.view(y.shape).to(y.dtype))
    rows_of = [y.detach().flatten(0, -2)[rows], found[0].flatten(0, -2)[rows]]
    return rows_of + list(found[1:])


@pytest.mark.parametrize("case", NORMS)
def test_norms_are_those_of_patches_of_one_voxel(case):
    module = NORMS[case]()
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    other, wide = copy.deepcopy(module), copy.deepcopy(module).double()
    x, order = patches(6), torch.randperm(MASK.num_patches)
    dy, every = torch.randn(MASK.num_patches, 6), torch.arange(MASK.num_patches)
    found = results(module, voxels_of(x, order), dy[order], every)
    naive = results(other, x, dy, order)
    truth = results(wide, x.to(torch.float64), dy, order)
    for ours, plain, exact in zip(found, naive, truth, strict=True):
        require(judge(case, ours, plain, exact, exact.abs() + exact.abs().mean() + 1))
    for name, buffer in module.named_buffers():
        assert torch.allclose(buffer, dict(other.named_buffers())[name])


@pytest.mark.parametrize("case", ["group", "instance", "plain"])
@pytest.mark.parametrize("other", [100.0, torch.nan])
def test_samples_are_normalised_apart(case, other):
    module, x = NORMS[case](), voxels_of(patches(6), torch.randperm(MASK.num_patches))
    mine = x.coordinates[:, 0] == 1
    moved = torch.where(mine[:, None], x.features, other)
    gradients = []
    for features in (x.features, moved):
        leaf = features.clone().requires_grad_()
        y = module(x.with_features(leaf)).features
        gradients.append((y[mine].detach(), torch.autograd.grad(y.square().sum(), leaf)[0][mine]))
    assert mine.any() and all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("case", NORMS)
def test_no_voxels(case):
    module = NORMS[case]()
    x = VoxelTensor(torch.ones(0, 6), torch.ones(0, 4).int(), (3, 3, 3), 2)
    assert module(x).features.shape == (0, 6)
    for name, buffer in module.named_buffers():
        assert torch.isfinite(buffer.float()).all(), name


# -- convolution ---------------------------------------------------------------------------------


def volume():
    return torch.randn(3, 4, 5, 4, 6).masked_fill(~ACTIVE[:, None], 0)


DENSE = {
    "same": lambda: nn.Conv3d(4, 8, 3, padding=1),
    "strided": lambda: nn.Conv3d(4, 8, 3, stride=2, padding=1, bias=False),
    "three-sizes": lambda: nn.Conv3d(4, 8, (2, 1, 3), (2, 1, 3), (0, 0, 1), groups=4),
    "transposed": lambda: nn.ConvTranspose3d(4, 8, 3, 2, 1, (1, 0, 1)),
    "transposed-groups": lambda: nn.ConvTranspose3d(4, 8, 2, 2, groups=2, bias=False),
}


@pytest.mark.parametrize("case", DENSE)
def test_convolution_takes_over_a_dense_one(case):
    dense = DENSE[case]()
    kind = SparseConvTranspose3d if "transposed" in case else SparseConv3d
    sparse = kind.from_torch(dense)
    assert sparse.state_dict().keys() == dense.state_dict().keys()
    assert sparse.weight is dense.weight and sparse.bias is dense.bias
    x = VoxelTensor.from_dense(volume(), ACTIVE)
    y = sparse(x)
    assert y.spatial_shape == dense(volume()).shape[2:]
    again = kind(4, 8, dense.kernel_size, dense.stride, dense.padding, groups=dense.groups)
    assert again.weight.shape == dense.weight.shape
    expected = read(dense(x.to_dense()), y.sites).features
    truth = read(copy.deepcopy(dense).double()(x.to_dense().double()), y.sites).features
    require(judge(case, y.features, expected, truth))


def test_submanifold_convolution_takes_voxels():
    dense = nn.Conv3d(4, 8, 3, padding=1)
    x = VoxelTensor.from_dense(volume(), ACTIVE)
    y = SubmanifoldConv3d.from_torch(dense)(x)
    expected = read(dense(x.to_dense()), x.sites).features
    truth = read(copy.deepcopy(dense).double()(x.to_dense().double()), x.sites).features
    require(judge("y", y.features, expected, truth))
    assert torch.equal(y.coordinates, x.coordinates)


def test_a_small_network_goes_down_and_up_and_learns():
    x = VoxelTensor.from_dense(volume(), ACTIVE)
    stem, norm = SubmanifoldConv3d(4, 8, 3), SparseInstanceNorm(8, affine=True)
    down, up = SparseConv3d(8, 16, 3, 2, 1), SparseConvTranspose3d(16, 4, 3, 2, 1)
    layers = nn.ModuleList([stem, norm, down, up])
    first = norm(stem(x))
    out = up(down(first), out_sites=x)
    assert out.coordinates is x.coordinates and out.channels == 4
    out.features.square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in layers.parameters())
    half = down(first, out_sites=down(first))
    assert torch.equal(half.features, down(first).features)


def test_weights_of_spconv():
    """Its layout is [C_out, kx, ky, kz, C_in]; what it computes is held in tests/ops."""
    for conv, order in (
        (SubmanifoldConv3d(4, 8, 3), (0, 2, 3, 4, 1)),
        (SparseConv3d(4, 8, (3, 1, 2)), (0, 2, 3, 4, 1)),
        (SparseConvTranspose3d(4, 8, (3, 1, 2)), (1, 2, 3, 4, 0)),
    ):
        wanted = {name: torch.randn_like(value) for name, value in conv.state_dict().items()}
        theirs = {"weight": wanted["weight"].permute(order), "bias": wanted["bias"]}
        load_spconv(conv, theirs)
        assert all(torch.equal(value, wanted[name]) for name, value in conv.state_dict().items())


CONV = SparseConv3d(4, 8, 3)
STATE = {"weight": torch.ones(8, 3, 3, 3, 4), "bias": torch.ones(8)}
WRONG = [
    (lambda: SparseConv3d.from_torch(nn.Linear(3, 3)), TypeError,
     "SparseConv3d: conv .*expected a torch.nn.Conv3d"),
    (lambda: SparseConvTranspose3d.from_torch(nn.Conv3d(3, 3, 3)), TypeError,
     "SparseConvTranspose3d: conv .*expected a torch.nn.ConvTranspose3d"),
    (lambda: SparseConv3d.from_torch(nn.Conv3d(3, 3, 3, padding="same")), ValueError,
     "SparseConv3d: conv has padding='same' .*SubmanifoldConv3d has padding 'same'"),
    (lambda: SparseConv3d.from_torch(nn.Conv3d(3, 3, 3, padding_mode="circular")), ValueError,
     "SparseConv3d: conv has .*expected numbers and 'zeros'"),
    (lambda: load_spconv(nn.Conv3d(4, 8, 3), STATE), TypeError,
     "load_spconv: conv .*expected a sparse convolution"),
    (lambda: load_spconv(CONV, {"weight": STATE["weight"]}), ValueError,
     r"load_spconv: state has \['weight'\]; expected \['bias', 'weight'\]"),
    (lambda: load_spconv(CONV, STATE | {"weight": torch.ones(8, 4, 3, 3, 3)}), ValueError,
     r"load_spconv: weight has shape \[8, 4, 3, 3, 3\]; expected that of \[8, 4, 3, 3, 3\] in"),
    (lambda: SparseGroupNorm(3, 6)(VoxelTensor.from_dense(volume(), ACTIVE)), ValueError,
     "SparseGroupNorm: x has 4 channels; expected 6"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "kind", "message"), WRONG)
def test_errors(call, kind, message):
    with pytest.raises(kind, match=message):
        call()
