"""convert_masked: dense encoders on active patches equal mask-after-every-op, and come back."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

from sparseattn import PatchGrid, PatchMask, convert_masked, revert_masked
from sparseattn.layers.sparse_pool import SparseGlobalPool
from sparseattn.testing.hyspark import Encoder, mask_after_every_op
from sparseattn.testing.tolerance import judge, require

TINY = {"channels": (4, 6, 8), "depths": (1, 2, 1), "ratios": (2, 1, 2)}


def draw(batch=2, grid=(2, 2, 2), keep=3):
    return PatchMask.from_scores(torch.rand(batch, *grid), keep)


def randomise(model):
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def gradients(model, maps, sent):
    if not maps[0].requires_grad:
        return {}
    parameters = dict(model.named_parameters())
    found = torch.autograd.grad(maps, list(parameters.values()), sent)
    return dict(zip(parameters, found, strict=True))


def run_dense(model, volume, mask, sent):
    """Every map at its active sites [P, p, p, p, C], and the gradient of every parameter."""
    hooks = mask_after_every_op(model, mask)
    maps = model(volume.masked_fill(~active_voxels(volume, mask), 0))
    for hook in hooks:
        hook.remove()
    maps = [PatchGrid.from_dense(y, mask).features for y in maps]
    return {f"map {i}": y.detach() for i, y in enumerate(maps)} | gradients(model, maps, sent)


def run_sparse(model, volume, mask, sent):
    maps = [y.features for y in model(PatchGrid.from_dense(volume, mask))]
    return {f"map {i}": y.detach() for i, y in enumerate(maps)} | gradients(model, maps, sent)


def active_voxels(volume, mask):
    patch = [size // cells for size, cells in zip(volume.shape[2:], mask.grid, strict=True)]
    return mask.to_dense(tuple(patch))[:, None]


def check(model, volume, mask, backward=True):
    """Hold the converted model against the dense one, forward and every gradient."""
    model.requires_grad_(backward)
    volume = volume.masked_fill(~active_voxels(volume, mask), torch.nan)
    double, sparse = copy.deepcopy(model).double(), copy.deepcopy(model)
    report = convert_masked(sparse)
    assert not report.refused, report
    maps = sparse(PatchGrid.from_dense(volume, mask))
    sent = [torch.randn_like(y.features) for y in maps]
    found = run_sparse(sparse, volume, mask, sent)
    naive = run_dense(model, volume, mask, sent)
    truth = run_dense(double, volume.double(), mask, [dy.double() for dy in sent])
    # what each is summed of is not smaller than its largest elements
    size = {n: t.abs() + t.abs().max() for n, t in truth.items()}
    require(
        *(judge(n, found[n], naive[n], t, size[n], terms(n, t, maps)) for n, t in truth.items())
    )
    return maps


def terms(name, truth, maps):
    """How many sites the gradient of a parameter is summed over (decision 0009); a map: few."""
    if name.startswith("map"):
        return None
    level = 0 if name.startswith("stem") else int(name.split(".")[1])
    return torch.full_like(truth, maps[level].features.shape[:4].numel())


def test_encoder_of_hyspark_equals_mask_after_every_op():
    mask = draw()
    maps = check(randomise(Encoder(**TINY)), torch.randn(2, 1, 8, 8, 8), mask)
    assert [y.patch for y in maps] == [(4, 4, 4), (2, 2, 2), (1, 1, 1)]
    assert all(y.mask is mask for y in maps)


@pytest.mark.slow
def test_encoder_of_hyspark_at_its_own_sizes():
    """96^3 voxels, 54 of 216 patches of 16^3, 32 to 384 channels: forward and backward."""
    mask, volume = draw(1, (6, 6, 6), 54), torch.randn(1, 1, 96, 96, 96)
    # Among millions of windows some have two values that rounding puts in another order, and their
    # gradients go to another voxel: the gradients of all parameters are compared with means.
    check(Encoder(pool=nn.AvgPool3d(2)), volume, mask)
    maps = check(Encoder(), volume, mask, backward=False)
    assert [y.channels for y in maps] == [32, 64, 128, 256, 384]
    for y in maps:
        assert y.mask.to_dense(y.patch).float().mean() == 0.25


def norms(channels=6):
    return nn.Sequential(
        nn.Conv3d(2, channels, 3, padding="same", dilation=2), nn.BatchNorm3d(channels), nn.ReLU(),
        nn.AvgPool3d(3, 2, 1, count_include_pad=False), nn.GroupNorm(3, channels), nn.SiLU(),
        nn.Conv3d(channels, 8, 2, stride=2, groups=2), nn.InstanceNorm3d(8, affine=True),
        nn.Identity(), nn.Dropout(0.0), nn.Conv3d(8, 8, 1, bias=False),
    )  # fmt: skip


def test_every_kind_of_module_is_swapped_and_comes_back():
    model = randomise(norms())
    names, state = [type(m) for m in model], copy.deepcopy(model.state_dict())
    order = list(model.parameters())
    report = convert_masked(model, dry_run=True)
    assert [type(m) for m in model] == names and len(report.swapped) == 10
    assert "would swap 10 of 10" in str(report)
    report = convert_masked(model)
    assert report.swapped == [str(i) for i in range(11) if i != 8] and not report.refused
    assert all(a is b for a, b in zip(model.parameters(), order, strict=True))
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    x = PatchGrid.from_dense(torch.randn(2, 2, 8, 8, 8), draw())
    pickled = pickle.loads(pickle.dumps(model.eval()))
    assert torch.equal(pickled(x).features, model(x).features)
    revert_masked(model)
    assert [type(m) for m in model] == names
    assert model.load_state_dict(state) and not hasattr(model[7], "num_groups")
    assert model(torch.randn(2, 2, 8, 8, 8)).shape == (2, 8, 2, 2, 2)


def test_whole_pipelines_give_what_their_layers_give():
    """Conv, pool and strided conv: the dense modules with the mask after each."""
    model = nn.Sequential(
        nn.Conv3d(2, 4, 3, padding=1), nn.AvgPool3d(3, 2, 1), nn.LeakyReLU(), nn.MaxPool3d(3, 1, 1),
        nn.Conv3d(4, 6, 3, stride=2, padding=1, groups=2), nn.SiLU(),
        nn.Conv3d(6, 6, (1, 2, 2), stride=(2, 2, 2), groups=2),
    )  # fmt: skip
    mask, volume = draw(), torch.randn(2, 2, 16, 16, 16)
    dense = copy.deepcopy(model)
    mask_after_every_op(dense, mask)
    active = active_voxels(volume, mask)
    expected = dense(volume.masked_fill(~active, 0))
    convert_masked(model)
    found = model(PatchGrid.from_dense(volume.masked_fill(~active, torch.nan), mask)).to_dense()
    double = copy.deepcopy(dense).double()
    truth = double(volume.masked_fill(~active, 0).double())
    size = truth.abs() + truth.abs().max() * (truth != 0)
    require(judge("y", *(t.detach() for t in (found, expected, truth, size))))


class Odd(nn.Module):
    def forward(self, x):
        return x


REFUSED = {
    "transposed": (nn.ConvTranspose3d(2, 2, 2, stride=2), "no twin for this class"),
    "too wide": (nn.Conv3d(2, 2, 5, stride=2, padding=1), "expected 2 * padding < dilation"),
    "no volume of half the size": (nn.Conv3d(2, 2, 3, stride=2), "expected 2 * padding <"),
    "circular": (
        nn.Conv3d(2, 2, 3, stride=2, padding=1, padding_mode="circular"), "expected zeros"
    ),
    "valid padding": (nn.Conv3d(2, 2, 3), "expected stride 1 and padding"),
    "running": (nn.InstanceNorm3d(2, track_running_stats=True), "statistics of each sample"),
    "wide layer norm": (nn.LayerNorm((2, 2)), "expected channels alone"),
    "ceil": (nn.MaxPool3d(2, ceil_mode=True), "ceil_mode=True"),
    "indices": (nn.MaxPool3d(2, return_indices=True), "return_indices=True"),
    "all channels at once": (nn.Dropout3d(), "no twin for this class"),
    "own": (Odd(), "no twin for this class"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_has_no_twin_is_named_and_left_alone(case):
    module, reason = REFUSED[case]
    report = convert_masked(nn.Sequential(module))
    assert reason in report.refused["0"] and reason in str(report)
    assert type(module).__name__ in str(report) and "forward" not in vars(module)


class Twin(nn.Module):
    def forward(self, x):
        return x + 1


def test_own_twins_and_skipped_modules():
    model = nn.Sequential(Odd(), nn.GELU(), nn.GELU())
    report = convert_masked(model, twins={Odd: Twin}, skip=["2"])
    assert report.refused == {"2": "named by skip"} and report.swapped == ["0", "1"]
    assert isinstance(model[0], Twin) and type(model[2]) is nn.GELU
    assert convert_masked(model, skip=["2"]).swapped == []  # a second time: what is left
    revert_masked(model)
    assert type(model[0]) is Odd and type(model[2]) is nn.GELU
    with pytest.raises(TypeError, match="convert_masked: model is 3"):
        convert_masked(3)


def test_one_graph_serves_a_new_mask_at_every_step():
    model, counter = randomise(Encoder((2, 3), (1, 1), (1, 1))), CompileCounter()
    convert_masked(model)

    def step(volume, scores):
        return model(PatchGrid.from_dense(volume, PatchMask.from_scores(scores, 2)))[-1].features

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend=counter)
    for _ in range(3):
        inputs = torch.randn(1, 1, 4, 4, 4), torch.rand(1, 2, 2, 1)
        found, expected = compiled(*inputs), step(*inputs)
        assert torch.equal(found, expected)
        weight = model.stem.weight
        assert torch.equal(
            torch.autograd.grad(found.square().sum(), weight)[0],
            torch.autograd.grad(expected.square().sum(), weight)[0],
        )
    assert counter.frame_count == 1
    torch._dynamo.reset()


def test_arithmetic_of_patch_grids():
    x = PatchGrid(torch.randn(6, 1, 2, 1, 3), draw())
    scale = torch.randn(1, 3, 1, 1, 1)
    y = 2 * x * scale - x + 1
    expected = 2 * x.features * scale.flatten() - x.features + 1
    assert torch.equal(y.features, expected) and y.mask is x.mask
    with pytest.raises(ValueError, match=r"PatchGrid: \+ of other patches"):
        x + PatchGrid(x.features, draw())
    for other in (torch.randn(1, 3, 1, 1, 2), "2"):
        with pytest.raises(TypeError, match=r"PatchGrid: \* with what .*expected a PatchGrid"):
            x * other


@pytest.mark.parametrize("mode", ["mean", "max"])
def test_global_pool_is_that_of_active_sites(mode):
    mask = PatchMask.from_mask(
        torch.tensor([0.0, 0.4, 1.1]).view(3, 1, 1, 1) > torch.rand(3, 2, 2, 2)
    )
    x = PatchGrid(torch.randn(mask.num_patches, 1, 2, 2, 5) - 3, mask)
    found = SparseGlobalPool(mode)(x)
    sample = mask.coordinates()[0]
    assert torch.equal(found[0], torch.zeros(5))
    for place in (1, 2):
        mine = x.features[sample == place].flatten(0, 3)
        expected = mine.mean(0) if mode == "mean" else mine.amax(0)
        require(judge(mode, found[place], expected, expected.double()))
    features = x.features.double().requires_grad_()
    module = SparseGlobalPool(mode)
    assert torch.autograd.gradcheck(lambda f: module(PatchGrid(f, mask)), features, fast_mode=True)


def test_wrong_inputs_of_layers():
    model = nn.Sequential(nn.Conv3d(3, 4, 4, stride=4))
    convert_masked(model)
    x = PatchGrid(torch.randn(6, 2, 2, 2, 3), draw())
    with pytest.raises(ValueError, match=r"SparseDownConv3d: stride is .*expected divisors"):
        model(x)
    with pytest.raises(TypeError, match=r"SparseDownConv3d: x has shape .*expected a PatchGrid"):
        model(x.features)
    with pytest.raises(ValueError, match="SparseDownConv3d: x has 2 channels; expected 3"):
        model(PatchGrid(torch.randn(6, 4, 4, 4, 2), x.mask))
    with pytest.raises(ValueError, match="SparseGlobalPool: mode is 'sum'"):
        SparseGlobalPool("sum")
    with pytest.raises(TypeError, match=r"SparseGlobalPool: x has shape .*expected a PatchGrid"):
        SparseGlobalPool()(x.features)
