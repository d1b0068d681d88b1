"""TileOrder: blocks are neighbourhoods, the order is undone exactly, windows mean the same."""

import re

import numpy as np
import pytest
import torch

from sparseattn import BlockMask, TileOrder, block_sparse_attention, topk_attention
from sparseattn.testing.tolerance import judge, require

GRIDS = [  # shape, tile, prefix
    (64, 8, 0),
    (70, None, 2),
    ((16, 24), (8, 8), 0),
    ((14, 14), None, 1),
    ((13, 21), (4, 16), 5),
    ((8, 8, 12), None, 0),
    ((5, 9, 7), (2, 4, 3), 1),
    ((1, 30, 1), (4, 4, 4), 1),
    ((3, 3), (8, 8), 0),
    ((0, 5), (2, 2), 3),
]


def size_of(shape, prefix):
    return prefix + int(np.prod(shape))


@pytest.mark.parametrize(("shape", "tile", "prefix"), GRIDS)
def test_undo_gives_back_every_bit(shape, tile, prefix):
    order = TileOrder.of_grid(shape, tile, prefix=prefix)
    length = size_of(shape, prefix)
    assert len(order) == length
    assert torch.equal(order.forward.sort().values, torch.arange(length))
    x = torch.randn(2, length, 3)
    assert torch.equal(order.undo(order.apply(x)), x)
    assert torch.equal(order.apply(order.undo(x)), x)
    assert torch.equal(order.apply(x)[:, :prefix], x[:, :prefix])
    heads = torch.randn(2, 3, length, 4)
    expected = order.apply(heads.transpose(1, 2)).transpose(1, 2)
    assert torch.equal(order.apply(heads, dim=-2), expected)


@pytest.mark.parametrize(
    ("shape", "tile"), [((16, 24), (8, 8)), ((8, 16, 12), (4, 4, 4)), ((8, 32, 8), (2, 8, 4))]
)
def test_every_block_is_a_tile_and_follows_its_neighbour(shape, tile):
    order = TileOrder.of_grid(shape, tile)
    places = np.stack(np.unravel_index(order.forward.numpy(), shape), 1).reshape(-1, 64, len(shape))
    low, high = places.min(1), places.max(1)
    assert (high - low == np.array(tile) - 1).all() and (low % np.array(tile) == 0).all()
    steps = np.abs(np.diff(low // np.array(tile), axis=0)).sum(1)
    assert (steps == 1).all()  # the next tile touches this one


def test_four_by_four_in_tiles_of_two():
    order = TileOrder.of_grid((4, 4), 2 * (2,))
    expected = [0, 1, 4, 5, 2, 3, 6, 7, 10, 11, 14, 15, 8, 9, 12, 13]
    assert order.forward.tolist() == expected


@pytest.mark.parametrize(("shape", "tile", "prefix"), GRIDS)
@pytest.mark.parametrize("radius", [0, 2])
def test_window_is_the_raster_window_in_another_order(shape, tile, prefix, radius):
    order = TileOrder.of_grid(shape, tile, prefix=prefix)
    for block_size in (16, (32, 16)):
        mask = order.window(radius, block_size=block_size)
        mask.validate()
        raster = BlockMask.window(shape, radius, block_size=block_size, prefix=prefix).to_dense()
        expected = raster[:, :, order.forward][..., order.forward]
        assert torch.equal(mask.to_dense(), expected)


def test_window_reaches_further_along_one_axis():
    order = TileOrder.of_grid((6, 10, 8), (2, 4, 2), prefix=1)
    raster = BlockMask.window((6, 10, 8), (1, 4, 2), block_size=16, prefix=1).to_dense()
    expected = raster[:, :, order.forward][..., order.forward]
    assert torch.equal(order.window((1, 4, 2), block_size=16).to_dense(), expected)


def test_tiles_need_fewer_blocks_than_strips():
    tiles = TileOrder.of_grid((64, 64)).window_blocks(8).sum()
    strips = (BlockMask.window((64, 64), 8).block_states() != -1).sum()
    assert tiles <= strips / 1.5


def test_window_unites_with_chosen_blocks():
    order = TileOrder.of_grid((12, 12), (4, 4), prefix=1)
    forced = order.window_blocks(0, block_size=16)
    assert forced[0, 0].diagonal().all() and forced[0, 0, 0].all() and forced[0, 0, :, 0].all()
    q, k, v = torch.randn(3, 1, 2, 145, 16).unbind()
    out, mask = topk_attention(q, k, v, 3, block_size=16, always=forced, return_mask=True)
    best = topk_attention(q, k, v, 3, block_size=16, return_mask=True)[1]
    expected = best | BlockMask.from_dense(forced, 145, 145, 16)
    assert torch.equal(mask.to_dense(), expected.to_dense())
    assert torch.equal(out, block_sparse_attention(q, k, v, expected))


def test_attention_in_another_order_is_the_same_attention():
    order = TileOrder.of_grid((7, 9), (4, 4), prefix=2)
    x = torch.randn(3, 1, 2, 65, 16, dtype=torch.float64)
    q, k, v = (order.apply(t, dim=2) for t in x)
    out = order.undo(block_sparse_attention(q, k, v, order.window(2)), dim=2)
    expected = block_sparse_attention(*x, BlockMask.window((7, 9), 2, prefix=2))
    require(judge("out", out, expected, expected))


def test_gradient_passes_through_in_order():
    order = TileOrder.of_grid((5, 6), (2, 3), prefix=1)
    x, sent = torch.randn(2, 2, 31, 3, dtype=torch.float64).unbind()
    (dx,) = torch.autograd.grad(order.apply(x.requires_grad_()), x, sent)
    assert torch.equal(dx, order.undo(sent))


def test_compiles_whole():
    order = TileOrder.of_grid((5, 6), (2, 3), prefix=1)
    compiled = torch.compile(
        lambda x: order.undo(order.apply(x) * 2), fullgraph=True, backend="eager"
    )
    x = torch.randn(1, 31, 4)
    assert torch.equal(compiled(x), x * 2)


def test_moves_and_describes_itself():
    order = TileOrder.of_grid((4, 6), (2, 3), prefix=1).to("meta")
    assert order.forward.device.type == order.inverse.device.type == "meta"
    assert repr(order) == "TileOrder(shape=(4, 6), tile=(2, 3), prefix=1, device='meta')"


WRONG = [
    (("a",), {}, TypeError, "shape is 'a' (str); expected an int or a tuple of one to three ints"),
    (((2, 2, 2, 2),), {}, ValueError, "expected an int or a tuple of one to three ints"),
    (((-1, 2),), {}, ValueError, "shape is -1; expected an int >= 0"),
    (((4, 4), (0, 2)), {}, ValueError, "tile is 0; expected an int >= 1"),
    (
        ((4, 4), 8),
        {},
        ValueError,
        "expected one int per axis, axes=2 (from shape)",
    ),
    (((4, 4),), {"prefix": -1}, ValueError, "prefix is -1; expected an int >= 0"),
]


@pytest.mark.parametrize(("arguments", "options", "error", "sentence"), WRONG)
def test_wrong_arguments(arguments, options, error, sentence):
    with pytest.raises(error, match=f"^TileOrder: .*{re.escape(sentence)}$"):
        TileOrder.of_grid(*arguments, **options)


def test_wrong_tensors():
    order = TileOrder.of_grid((4, 4), (2, 2))
    sentence = "TileOrder: x has shape [1, 17, 2]; expected 16 tokens in dimension 1"
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        order.apply(torch.randn(1, 17, 2))
    with pytest.raises(ValueError, match="dim is 3; expected a dimension of x, dims=3"):
        order.undo(torch.randn(1, 16, 2), dim=3)
    with pytest.raises(TypeError, match="x is 3"):
        order.apply(3)
    with pytest.raises(ValueError, match="x is on meta; expected the device of order"):
        order.apply(torch.empty(1, 16, 2, device="meta"))
