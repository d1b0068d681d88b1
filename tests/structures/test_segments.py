"""Segments against what they mean, written with loops."""

import pytest
import torch

from sparseattn.structures.segments import Segments, cells_of

CPU = torch.device("cpu")


def check(segments, ids, count):
    """Hold all lists of one sample against its ids."""
    assert segments.ids[0].tolist() == ids
    assert segments.counts[0].tolist() == [ids.count(r) for r in range(count)]
    order = range(len(ids)) if segments.order is None else segments.order.tolist()
    assert sorted(order) == list(range(len(ids)))
    starts = segments.starts[0].tolist()
    assert starts[0] == 0 and starts[-1] == len(ids)
    for r in range(count):
        listed = [list(order)[i] for i in range(starts[r], starts[r + 1])]
        assert [i for i in listed if ids[i] >= 0] == [i for i, x in enumerate(ids) if x == r]


@pytest.mark.parametrize(("length", "count"), [(197, 49), (12, 4), (7, 7), (3, 5), (1, 64), (0, 2)])
def test_balanced(length, count):
    segments = Segments.balanced(length, count, None, CPU)
    sizes = segments.counts[0]
    assert sizes.sum() == length and sizes.max() - sizes.min() <= 1
    assert segments.ids[0].tolist() == sorted(segments.ids[0].tolist())
    check(segments, segments.ids[0].tolist(), count)


@pytest.mark.parametrize("count", [1, 5, 49])
def test_masked_tokens_move_no_border(count):
    mask = torch.rand(3, 40) < 0.5
    mask[1], mask[2] = False, True
    segments = Segments.balanced(40, count, mask, CPU)
    for sample in range(3):
        taken = mask[sample].nonzero()[:, 0].tolist()
        alone = Segments.balanced(len(taken), count, None, CPU).ids[0].tolist()
        expected = [-1] * 40
        for token, segment in zip(taken, alone, strict=True):
            expected[token] = segment
        lists = (segments.ids, segments.counts, segments.starts)
        check(Segments(*(t[sample : sample + 1] for t in lists), None), expected, count)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("grid", "cells", "prefix"),
    [((4, 6), (2, 3), 0), ((5, 3), (2, 2), 1), ((3, 4, 5), (1, 2, 3), 2)],
)
def test_grid(grid, cells, prefix, masked):
    places = torch.cartesian_prod(*(torch.arange(size) for size in grid)).tolist()
    ids = list(range(prefix))
    for place in places:
        box = 0
        for at, parts, size in zip(place, cells, grid, strict=True):
            box = box * parts + at * parts // size
        ids.append(prefix + box)
    mask = None
    if masked:
        mask = torch.rand(1, len(ids)) < 0.5
        ids = [x if shown else -1 for x, shown in zip(ids, mask[0].tolist(), strict=True)]
    count = prefix + torch.Size(cells).numel()
    check(Segments.of_grid(grid, cells, prefix, mask, CPU), ids, count)


@pytest.mark.parametrize(
    ("grid", "count", "cells"),
    [((32, 32), 64, (8, 8)), ((14, 14), 49, (7, 7)), ((64, 16), 64, (16, 4)), ((4, 4), 99, (4, 4)),
     ((8, 8, 8), 64, (4, 4, 4)), ((96, 96, 32), 1, (1, 1, 1))],
)  # fmt: skip
def test_boxes_are_near_cubes(grid, count, cells):
    assert cells_of(grid, count) == cells
