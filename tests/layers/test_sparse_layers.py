"""Layers on active sites against torch's layers on the same sites, gradients and state dicts."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sparseattn import PatchGrid, PatchMask
from sparseattn.layers.sparse_norm import (
    SparseBatchNorm,
    SparseGroupNorm,
    SparseInstanceNorm,
    SparseLayerNorm,
    SparseSyncBatchNorm,
)
from sparseattn.layers.submanifold_conv3d import SubmanifoldConv3d
from sparseattn.testing.tolerance import judge, require

SHOWN = torch.tensor([[0, 0, 0, 0, 0, 0, 0, 0], [1, 0, 0, 1, 0, 0, 1, 0], [1, 1, 1, 0, 1, 1, 1, 1]])
MASK = PatchMask.from_mask(SHOWN.bool().view(3, 2, 2, 2))


def grid(channels, dtype=torch.float32, mask=MASK):
    features = torch.randn(mask.num_patches, 2, 1, 2, channels) * 2 + torch.arange(channels)
    return PatchGrid(features.to(dtype), mask)


def randomise(module):
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    return module


def by_sample(norm):
    """Torch's layer, one sample's active sites [1, C, n] at a time."""

    def normalise(x):
        sample = x.mask.coordinates()[0]
        out = torch.zeros_like(x.features)
        for place in range(x.batch):
            mine = x.features[sample == place]
            if len(mine):
                sites = norm(mine.flatten(0, 3).T[None])
                out = out.index_put(
                    ((sample == place).nonzero()[:, 0],), sites[0].T.view(mine.shape)
                )
        return out

    return normalise


CASES = {  # ours, torch's on [n, C], or on [1, C, n] of a sample
    "batch": (lambda: SparseBatchNorm(6), lambda: nn.BatchNorm1d(6), False),
    "sync": (lambda: SparseSyncBatchNorm(6), lambda: nn.BatchNorm1d(6), False),
    "layer": (lambda: SparseLayerNorm(6, eps=1e-6), lambda: nn.LayerNorm(6, eps=1e-6), False),
    "group": (lambda: SparseGroupNorm(3, 6), lambda: nn.GroupNorm(3, 6), True),
    "instance": (lambda: SparseInstanceNorm(6, affine=True), lambda: nn.GroupNorm(6, 6), True),
    "plain": (lambda: SparseInstanceNorm(6), lambda: nn.GroupNorm(6, 6, affine=False), True),
}


def results(module, normalise, x, dy):
    features = x.features.detach().requires_grad_()
    y = normalise(x.with_features(features))
    parameters = list(module.parameters())
    names = ["y", "dx", *(f"d{name}" for name, _ in module.named_parameters())]
    gradients = torch.autograd.grad(y, [features, *parameters], dy.to(y.dtype))
    return dict(zip(names, [y.detach(), *gradients], strict=True))


@pytest.mark.parametrize("case", CASES)
def test_statistics_are_those_of_active_sites(case):
    ours, theirs, apart = CASES[case]
    ours, theirs = randomise(ours()), theirs()
    theirs.load_state_dict(ours.state_dict())  # names are torch's
    wide = type(theirs).__new__(type(theirs))
    wide.__dict__ = {**theirs.__dict__}
    x = grid(6)
    dy = torch.randn_like(x.features)

    def torch_way(norm):
        flat = by_sample(norm) if apart else None
        return flat or (lambda x: norm(x.features.flatten(0, 3)).view(x.features.shape))

    import copy

    double = copy.deepcopy(theirs).double()
    found = results(ours, lambda x: ours(x).features, x, dy)
    naive = results(theirs, torch_way(theirs), x, dy)
    truth = results(double, torch_way(double), x.to(torch.float64), dy)
    size = {name: t.abs() + t.abs().mean() + 1 for name, t in truth.items()}
    require(*(judge(n, found[n], naive[n], truth[n], size[n]) for n in truth))
    for name, buffer in ours.named_buffers():
        kept = dict(theirs.named_buffers())[name]
        assert torch.allclose(buffer, kept)


@pytest.mark.parametrize("case", ["batch", "sync"])
def test_evaluation_uses_running_statistics(case):
    module = CASES[case][0]()
    module(grid(6))
    module.eval()
    x = grid(6)
    expected = F.batch_norm(x.features.flatten(0, 3), module.running_mean, module.running_var)
    assert torch.allclose(module(x).features.flatten(0, 3), expected)


@pytest.mark.parametrize("case", ["group", "instance", "plain"])
def test_samples_are_normalised_apart(case):
    """HySparK's instance norm deals the sites of one sample out to all of them."""
    module, x = CASES[case][0](), grid(6)
    moved = x.features.clone()
    moved[x.mask.coordinates()[0] == 2] += 100
    first, second = module(x).features, module(x.with_features(moved)).features
    mine = x.mask.coordinates()[0] == 1
    assert mine.any() and torch.equal(first[mine], second[mine])
    sites = second[x.mask.coordinates()[0] == 2].flatten(0, 3)
    assert sites.mean().abs() < 0.01


@pytest.mark.parametrize("case", CASES)
def test_no_active_patches(case):
    module = CASES[case][0]()
    x = grid(6, mask=PatchMask.from_scores(torch.rand(2, 1, 2, 2), 0))
    assert module(x).features.shape == (0, 2, 1, 2, 6)
    for name, buffer in module.named_buffers():
        assert torch.isfinite(buffer.float()).all(), name


@pytest.mark.parametrize("case", ["group", "instance"])
def test_gradients_in_float64(case):
    module, x = randomise(CASES[case][0]()).double(), grid(6, torch.float64)
    features = x.features.requires_grad_()
    run = lambda f: module(x.with_features(f)).features  # noqa: E731
    assert torch.autograd.gradcheck(run, features, fast_mode=True)


def test_group_norm_names_the_channels_it_expects():
    with pytest.raises(ValueError, match="SparseGroupNorm: x has 5 channels; expected 6"):
        SparseGroupNorm(3, 6)(grid(5))


# -- convolution ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{}, {"dilation": 2, "padding": 2}, {"groups": 4, "bias": False}, {"padding": "same"}],
)
def test_convolution_takes_over_a_dense_one(options):
    dense = nn.Conv3d(4, 8, 3, **{"padding": 1, **options})
    sparse = SubmanifoldConv3d.from_torch(dense)
    assert sparse.state_dict().keys() == dense.state_dict().keys()
    assert sparse.weight is dense.weight and sparse.bias is dense.bias
    x = grid(4)
    expected = PatchGrid.from_dense(dense(x.to_dense()), MASK).features
    truth = PatchGrid.from_dense(dense.double()(x.to_dense().double()), MASK).features
    dense.float()
    require(judge("y", SubmanifoldConv3d.from_torch(dense)(x).features, expected, truth))


def test_convolution_starts_as_a_dense_one_does():
    torch.manual_seed(3)
    dense = nn.Conv3d(4, 8, (1, 3, 2), groups=2)
    torch.manual_seed(3)
    sparse = SubmanifoldConv3d(4, 8, (1, 3, 2), groups=2)
    assert torch.equal(sparse.weight, dense.weight) and torch.equal(sparse.bias, dense.bias)


@pytest.mark.parametrize(
    ("module", "kind", "message"),
    [
        (nn.Linear(3, 3), TypeError, "expected a torch.nn.Conv3d"),
        (nn.Conv3d(3, 3, 3), ValueError, "expected stride 1 and padding"),
        (nn.Conv3d(3, 3, 3, padding=1, stride=2), ValueError, "expected stride 1 and padding"),
        (nn.Conv3d(3, 3, 2, padding=1), ValueError, "expected stride 1 and padding"),
        (nn.Conv3d(3, 3, 3, padding=1, padding_mode="circular"), ValueError, "expected 'zeros'"),
    ],
)
def test_convolutions_that_have_no_twin(module, kind, message):
    with pytest.raises(kind, match=f"SubmanifoldConv3d: conv .*{message}"):
        SubmanifoldConv3d.from_torch(module)
