"""PatchMask and PatchGrid against their definition: a mask of patches, a volume times it."""

import itertools

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from sparseattn import PatchGrid, PatchMask

MASKS = {
    "scores": lambda: PatchMask.from_scores(torch.rand(3, 2, 4, 3), 7),
    "ragged": lambda: PatchMask.from_mask(torch.rand(4, 3, 2, 3) < 0.4),
    "empty sample": lambda: PatchMask.from_mask(
        (torch.rand(3, 2, 2, 3) < 0.5) & (torch.arange(3) != 1)[:, None, None, None]
    ),
    "none": lambda: PatchMask.from_scores(torch.rand(2, 3, 3, 3), 0),
    "full": lambda: PatchMask.from_scores(torch.rand(2, 3, 1, 2), 6),
    "no samples": lambda: PatchMask.from_mask(torch.zeros(0, 2, 2, 2, dtype=torch.bool)),
}


def same(first, second):
    pairs = zip(vars(first).values(), vars(second).values(), strict=True)
    return all(torch.equal(a, b) and a.dtype == b.dtype == torch.int32 for a, b in pairs)


@pytest.mark.parametrize("kind", MASKS)
def test_rows_are_numbered_in_raster_order_and_know_their_neighbours(kind):
    mask = MASKS[kind]()
    active = mask.to_dense()
    places = active.nonzero()
    assert mask.num_patches == len(places)
    assert torch.equal(torch.stack(mask.coordinates(), 1), places)
    assert torch.equal(mask.table[active], torch.arange(len(places), dtype=torch.int32))
    assert (mask.table[~active] == -1).all()
    for reach in (1, 2):
        found = mask.neighbour_rows((reach, 1, reach))
        steps = itertools.product(range(-reach, reach + 1), (-1, 0, 1), range(-reach, reach + 1))
        for column, step in enumerate(steps):
            for row, (sample, *place) in enumerate(places.tolist()):
                at = [p + s for p, s in zip(place, step, strict=True)]
                inside = all(0 <= a < n for a, n in zip(at, mask.grid, strict=True))
                expected = int(mask.table[sample, at[0], at[1], at[2]]) if inside else -1
                assert found[row, column] == expected


@pytest.mark.parametrize("kind", MASKS)
def test_every_order_lists_all_patches_faces_first(kind):
    mask = MASKS[kind]()
    rows = torch.arange(mask.num_patches, dtype=torch.int32)
    assert mask.order.shape == (64, mask.num_patches)
    assert torch.equal(mask.order.sort(1).values, rows.expand(64, -1))
    # a place at the low end of x alone (kind 16): its one neighbour is the patch before, entry 4
    has_face = mask.neighbours[:, 4] >= 0
    sorted_by_face = has_face[mask.order[16].long()]
    assert torch.equal(sorted_by_face, has_face.sort(descending=True).values)
    assert torch.equal(mask.order[0], rows)  # inside a patch there is nothing to sort by


def test_scores_keep_the_best_and_ties_go_to_the_first():
    scores = torch.tensor([[3.0, 1.0, 3.0, 2.0], [5.0, 5.0, 5.0, 5.0]]).view(2, 1, 2, 2)
    mask = PatchMask.from_scores(scores, 2)
    assert mask.to_dense().flatten(1).int().tolist() == [[1, 0, 1, 0], [1, 1, 0, 0]]
    assert PatchMask.from_scores(torch.rand(2, 6, 6, 6), 54).to_dense().float().mean() == 0.25


@pytest.mark.parametrize("kind", ["scores", "none", "full"])
def test_a_promised_count_gives_the_same_mask(kind):
    mask = MASKS[kind]()
    keep = mask.num_patches // mask.batch
    assert same(mask, PatchMask.from_mask(mask.to_dense(), keep))
    assert same(mask, PatchMask.from_mask(mask.to_dense()))
    with pytest.raises(RuntimeError, match="another number of True patches"):
        PatchMask.from_mask(mask.to_dense(), keep - 1 if keep else 1)


def test_permuted_masks_and_scores():
    scores = torch.rand(4, 3, 2, 2)
    assert same(
        PatchMask.from_scores(scores.permute(3, 1, 2, 0).contiguous().permute(3, 1, 2, 0), 5),
        PatchMask.from_scores(scores, 5),
    )
    active = scores < 0.5
    assert same(PatchMask.from_mask(active.mT.contiguous().mT), PatchMask.from_mask(active))


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("patch", [1, (1, 2, 3)])
def test_dense_and_back(kind, patch):
    mask = MASKS[kind]()
    active = mask.to_dense(patch)[:, None]
    volume = torch.randn(mask.batch, 5, *active.shape[2:], dtype=torch.float64)
    hidden = volume.masked_fill(~active, torch.nan)
    grid = PatchGrid.from_dense(hidden, mask)
    assert grid.spatial_shape == active.shape[2:] and grid.channels == 5
    assert torch.equal(grid.to_dense(), volume.masked_fill(~active, 0))
    again = PatchGrid.from_dense(grid.to_dense().transpose(2, 4).contiguous().transpose(2, 4), mask)
    assert torch.equal(again.features, grid.features)


def test_dense_and_back_are_differentiable():
    mask = MASKS["scores"]()
    volume = torch.randn(3, 2, 4, 4, 3, dtype=torch.float64, requires_grad=True)
    features = torch.randn(21, 2, 1, 1, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: PatchGrid.from_dense(x, mask).features, volume)
    assert torch.autograd.gradcheck(lambda x: PatchGrid(x, mask).to_dense(), features)


def test_new_masks_do_not_compile_anew():
    counter = CompileCounter()

    @torch.compile(fullgraph=True, backend=counter)
    def step(volume, scores, active):
        mask, other = PatchMask.from_scores(scores, 3), PatchMask.from_mask(active, 3)
        grid = PatchGrid.from_dense(volume, mask)
        return grid.with_features(grid.features * 2).to_dense(), other.order

    for _ in range(3):
        scores, volume = torch.rand(2, 2, 2, 2), torch.randn(2, 3, 4, 4, 4)
        mask = PatchMask.from_scores(scores, 3)
        dense, order = step(volume, scores, mask.to_dense())
        assert torch.equal(dense, 2 * volume * mask.to_dense(2)[:, None])
        assert torch.equal(order, mask.order)
    assert counter.frame_count == 1
    torch._dynamo.reset()


def test_moves_and_descriptions():
    mask = MASKS["scores"]()
    grid = PatchGrid(torch.randn(21, 2, 2, 2, 4), mask)
    half = grid.to(torch.float16)
    assert half.dtype == torch.float16 and half.mask.table.dtype == torch.int32
    assert mask.to("meta").device.type == grid.to("meta").mask.device.type == "meta"
    assert "grid=(2, 4, 3)" in repr(mask) and "channels=4" in repr(grid)


ACTIVE = torch.ones(2, 2, 2, 2, dtype=torch.bool)
MASK = PatchMask.from_mask(ACTIVE)
WRONG = [
    (lambda: PatchMask.from_scores(ACTIVE, 2), TypeError,
     "scores has dtype torch.bool; expected a floating point dtype"),
    (lambda: PatchMask.from_scores(torch.rand(2, 2, 2), 2), ValueError,
     "scores has shape [2, 2, 2]; expected [B, fx, fy, fz]"),
    (lambda: PatchMask.from_scores(torch.rand(2, 2, 2, 2), 9), ValueError,
     "keep is 9; expected at most 8 patches of a sample"),
    (lambda: PatchMask.from_scores(torch.rand(2, 2, 2, 2), -1), ValueError,
     "keep is -1; expected an int >= 0"),
    (lambda: PatchMask.from_scores(torch.rand(2, 2, 2, 2), 0.5), TypeError,
     "keep is 0.5 (float); expected an int >= 0"),
    (lambda: PatchMask.from_mask(ACTIVE.int()), TypeError,
     "active has dtype torch.int32; expected torch.bool"),
    (lambda: PatchMask.from_mask(None), TypeError,
     "active is None (NoneType); expected a torch.Tensor"),
    (lambda: MASK.to_dense(0), ValueError, "patch is 0; expected an int >= 1"),
    (lambda: MASK.to_dense((1, 2)), TypeError,
     "patch is (1, 2) (tuple); expected an int >= 1 or three of them"),
    (lambda: PatchGrid(torch.rand(16, 2, 2, 2, 3), None), TypeError,
     "mask is None (NoneType); expected a PatchMask"),
    (lambda: PatchGrid(torch.rand(15, 2, 2, 2, 3), MASK), ValueError,
     "features has shape [15, 2, 2, 2, 3]; expected [P, px, py, pz, C], P=16 (from mask)"),
    (lambda: PatchGrid(torch.rand(16, 2, 0, 2, 3), MASK), ValueError,
     "features has shape [16, 2, 0, 2, 3]; expected patches of a voxel or more"),
    (lambda: PatchGrid(torch.ones(16, 2, 2, 2, 3).int(), MASK), TypeError,
     "features has dtype torch.int32; expected a floating point dtype"),
    (lambda: PatchGrid(torch.rand(16, 2, 2, 2, 3).to("meta"), MASK), ValueError,
     "features is on meta; expected the device of mask, device=cpu (from mask)"),
    (lambda: PatchGrid.from_dense(torch.rand(2, 1, 4, 4, 5), MASK), ValueError,
     "x has shape [2, 1, 4, 4, 5]; expected X, Y, Z that are multiples of the grid, "
     "grid=(2, 2, 2) (from mask)"),
    (lambda: PatchGrid.from_dense(torch.rand(3, 1, 4, 4, 4), MASK), ValueError,
     "x has shape [3, 1, 4, 4, 4]; expected [B, C, X, Y, Z], B=2 (from mask)"),
    (lambda: PatchGrid.from_dense(torch.rand(2, 1, 4, 4, 4), ACTIVE), TypeError,
     "mask has shape [2, 2, 2, 2]; expected a PatchMask"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "kind", "message"), WRONG)
def test_errors(call, kind, message):
    with pytest.raises(kind) as caught:
        call()
    assert str(caught.value).split(": ", 1)[1] == message
