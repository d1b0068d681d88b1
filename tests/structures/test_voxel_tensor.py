"""VoxelTensor against its definition, a dense volume; and the sentences of its errors."""

import re
from dataclasses import replace

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from sparseattn import KernelMap, VoxelTensor

SHAPE = (3, 4, 5)
ACTIVE = {
    "some": lambda: torch.rand(3, *SHAPE) < 0.3,
    "empty sample": lambda: (torch.rand(3, *SHAPE) < 0.5) & (torch.arange(3) != 1).view(3, 1, 1, 1),
    "none": lambda: torch.zeros(2, *SHAPE, dtype=torch.bool),
    "full": lambda: torch.ones(2, *SHAPE, dtype=torch.bool),
    "no samples": lambda: torch.zeros(0, *SHAPE, dtype=torch.bool),
}


@pytest.mark.parametrize("kind", ACTIVE)
def test_dense_and_back(kind):
    active = ACTIVE[kind]()
    volume = torch.randn(len(active), 6, *SHAPE, dtype=torch.float64)
    x = VoxelTensor.from_dense(volume.masked_fill(~active[:, None], torch.nan), active)
    assert torch.equal(x.coordinates, active.nonzero().int())
    assert (x.spatial_shape, x.batch_size, x.channels) == (SHAPE, len(active), 6)
    shown = volume.masked_fill(~active[:, None], 0)
    assert torch.equal(x.to_dense(), shown)
    again = VoxelTensor.from_dense(shown.transpose(2, 4).contiguous().transpose(2, 4))
    assert torch.equal(again.features, x.features)
    assert torch.equal(again.coordinates, x.coordinates)
    x.validate()


def test_any_order_of_coordinates():
    x = VoxelTensor.from_dense(torch.randn(2, 3, *SHAPE), torch.rand(2, *SHAPE) < 0.4)
    order = torch.randperm(x.num_voxels)
    columns = x.coordinates[order].T.contiguous().T  # as mask.nonzero() lays them out
    shuffled = VoxelTensor(x.features[order], columns, SHAPE, 2)
    assert not columns.is_contiguous() and torch.equal(shuffled.to_dense(), x.to_dense())
    rows, moved = x.kernel_map(3, padding=1).rows, shuffled.kernel_map(3, padding=1).rows
    values = torch.cat((x.features, torch.zeros(1, 3)))  # row -1
    same = torch.cat((shuffled.features, torch.zeros(1, 3)))
    assert torch.equal(values[rows.long()][:, order], same[moved.long()])


def test_voxels_of_nan_and_of_zero():
    volume = torch.zeros(1, 2, *SHAPE)
    volume[0, 1, 1, 2, 3], volume[0, 0, 2, 0, 0] = torch.nan, -0.0
    assert VoxelTensor.from_dense(volume).coordinates.tolist() == [[0, 1, 2, 3]]


def test_dense_and_back_are_differentiable():
    active = ACTIVE["some"]()
    volume = torch.randn(3, 2, *SHAPE, dtype=torch.float64, requires_grad=True)
    x = VoxelTensor.from_dense(volume, active)
    features = torch.randn_like(x.features, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v: VoxelTensor.from_dense(v, active).features, volume)
    assert torch.autograd.gradcheck(lambda f: x.with_features(f).to_dense(), features)


def test_maps_are_shared_by_all_features_on_the_same_voxels():
    x = VoxelTensor.from_dense(torch.randn(2, 3, *SHAPE), torch.rand(2, *SHAPE) < 0.4)
    found = x.kernel_map(3, padding=1)
    assert isinstance(found, KernelMap)
    assert x.with_features(x.features * 2).kernel_map((3, 3, 3), padding=1) is found
    assert x.to(torch.float64).kernel_map(3, padding=(1, 1, 1)) is found
    assert x.kernel_map(3, padding=1, dilation=2) is not found
    assert x.kernel_map(3, padding=1, out_sites=x.with_features(x.features[:, :1])) is found


def test_moves_and_descriptions():
    x = VoxelTensor(torch.randn(7, 4), torch.arange(28).view(7, 4).int(), (99, 99, 99), 99)
    assert x.to(torch.float16).dtype == torch.float16 and x.to("meta").device.type == "meta"
    assert x.to("meta").made == [] and x.to("meta").coordinates.dtype == torch.int32
    assert "num_voxels=7" in repr(x) and "taps=27" in repr(x.kernel_map(3))


def test_new_voxels_do_not_compile_anew():
    counter = CompileCounter()

    @torch.compile(fullgraph=True, backend=counter)
    def step(features, coordinates):
        x = VoxelTensor(features, coordinates, SHAPE, 2)
        found = x.kernel_map(3, padding=1)
        again = x.with_features(features * 2)
        return again.to_dense(), found.rows, again.kernel_map(3, padding=1).transposed().rows

    for count in (5, 9, 30, 31, 60):
        places = torch.ones(2, *SHAPE).nonzero().int()[torch.randperm(120)[:count]]
        x = VoxelTensor(torch.randn(count, 3), places, SHAPE, 2)
        dense, rows, back = step(x.features, x.coordinates)
        assert torch.equal(dense, 2 * x.to_dense())
        found = x.kernel_map(3, padding=1)
        assert torch.equal(rows, found.rows) and torch.equal(back, found.transposed().rows)
    assert counter.frame_count <= 2  # once for a number of voxels, once for any
    torch._dynamo.reset()


F, C = torch.randn(3, 2), torch.tensor([[0, 0, 0, 0], [0, 1, 2, 3], [1, 2, 3, 4]]).int()
GOOD = VoxelTensor(F, C, SHAPE, 2)


def put(row, place):
    changed = C.clone()
    changed[row] = torch.tensor(place)
    return replace(GOOD, coordinates=changed, made=[])


OUTSIDE = "expected 0 <= coordinate < [2, 3, 4, 5] (from batch_size and spatial_shape)"
WRONG_VALUES = {
    "outside": (put(1, [0, 0, 4, 0]), f"coordinates[1] is [0, 0, 4, 0]; {OUTSIDE}"),
    "negative": (put(2, [1, 0, 0, -1]), f"coordinates[2] is [1, 0, 0, -1]; {OUTSIDE}"),
    "sample": (put(0, [2, 0, 0, 0]), f"coordinates[0] is [2, 0, 0, 0]; {OUTSIDE}"),
    "twice": (
        put(2, [0, 0, 0, 0]),
        "coordinates[2] is [0, 0, 0, 0], as coordinates[0] is; expected each site once",
    ),
}


@pytest.mark.parametrize("case", WRONG_VALUES)
@pytest.mark.parametrize("method", ["table", "search"])
def test_first_wrong_coordinate_is_named(case, method, monkeypatch):
    from sparseattn.structures import site_lookup

    monkeypatch.setattr(site_lookup, "choose", lambda *_: method)
    x, message = WRONG_VALUES[case]
    message = f"^VoxelTensor: {re.escape(message)}$"
    calls = (
        x.validate,
        lambda: x.kernel_map(3, padding=1),
        lambda: x.kernel_map(2),
        lambda: GOOD.kernel_map(3, padding=1, out_sites=x),
    )
    for call in calls:
        with pytest.raises(ValueError, match=message):
            call()


WRONG = [
    (lambda: VoxelTensor(F.int(), C, SHAPE, 2), TypeError,
     "features has dtype torch.int32; expected a floating point dtype"),
    (lambda: VoxelTensor(F[0], C, SHAPE, 2), ValueError,
     "features has shape [2]; expected [N, C]"),
    (lambda: VoxelTensor(F, C[:2], SHAPE, 2), ValueError,
     "coordinates has shape [2, 4]; expected [N, 4], N=3 (from features)"),
    (lambda: VoxelTensor(F, C.long(), SHAPE, 2), TypeError,
     "coordinates has dtype torch.int64; expected torch.int32"),
    (lambda: VoxelTensor(F, C.to("meta"), SHAPE, 2), ValueError,
     "coordinates is on meta; expected the device of features, device=cpu (from features)"),
    (lambda: VoxelTensor(F, C, [3, 4, 5], 2), TypeError,
     "spatial_shape is [3, 4, 5] (list); expected a tuple of three ints"),
    (lambda: VoxelTensor(F, C, (3, 0, 5), 2), ValueError,
     "spatial_shape is 0; expected an int >= 1"),
    (lambda: VoxelTensor(F, C, SHAPE, 2.0), TypeError,
     "batch_size is 2.0 (float); expected an int >= 0"),
    (lambda: VoxelTensor.from_dense(torch.rand(2, 3, 4, 5)), ValueError,
     "x has shape [2, 3, 4, 5]; expected [B, C, X, Y, Z]"),
    (lambda: VoxelTensor.from_dense(torch.rand(1, 1, *SHAPE), torch.ones(1, *SHAPE)), TypeError,
     "active has dtype torch.float32; expected torch.bool"),
    (lambda: GOOD.kernel_map(0), ValueError, "kernel_size is 0; expected an int >= 1"),
    (lambda: GOOD.kernel_map(3, padding=-1), ValueError, "padding is -1; expected an int >= 0"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "kind", "message"), WRONG)
def test_errors(call, kind, message):
    with pytest.raises(kind, match=f"^VoxelTensor: {re.escape(message)}$"):
        call()
