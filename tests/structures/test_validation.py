"""BlockMask.validate() names the first value that is wrong."""

from dataclasses import replace

import pytest
import torch

from sparseattn import BlockMask
from sparseattn.constants import PAD_INDEX
from sparseattn.structures.block_lists import BlockLists

# 3 x 4 blocks of 16 x 16, one batch entry and head
FULL = torch.tensor([[[[1, 0, 0, 1], [0, 1, 0, 0], [0, 0, 0, 0]]]]).bool()


def full_mask():
    return BlockMask.from_dense(FULL, 40, 64, 16)


def mixed_mask():
    """Row 0: block 0 full. Row 1: blocks 1 and 2 partial. Row 2: block 2 partial."""
    keep = torch.zeros(1, 1, 40, 64, dtype=torch.bool)
    keep[..., :16, :16] = True
    keep[..., 16:32, 20:40] = True
    keep[..., 33, 40] = True
    return BlockMask.from_token_mask(keep, 16)


def lists(offsets, indices, slots=None):
    pack = [
        None if x is None else torch.tensor([[x]], dtype=torch.int32)
        for x in (offsets, indices, slots)
    ]
    return BlockLists(*pack)


def message(mask):
    with pytest.raises(ValueError) as error:
        mask.validate()
    return str(error.value)


def edit(part, **changes):
    """Copy of the lists with single values replaced: edit(rows, indices={0: 5})."""
    changed = {}
    for name, values in changes.items():
        tensor = getattr(part, name).clone()
        for place, value in values.items():
            tensor[..., place] = value
        changed[name] = tensor
    return replace(part, **changed)


def test_lists_as_they_are_built():
    mask = full_mask()
    assert mask.rows.offsets.flatten().tolist() == [0, 2, 3, 3]
    assert mask.rows.indices.flatten().tolist() == [0, 3, 1] + [PAD_INDEX] * 9
    assert mask.columns.offsets.flatten().tolist() == [0, 1, 2, 2, 3]
    assert mask.columns.indices.flatten().tolist() == [0, 1, 0] + [PAD_INDEX] * 9
    mask.validate()


def test_by_hand():
    rows, columns = lists([0, 2, 3, 3], [0, 3, 1]), lists([0, 1, 2, 2, 3], [0, 1, 0])
    mask = BlockMask(40, 64, (16, 16), rows, columns)
    mask.validate()
    assert torch.equal(mask.to_dense(), full_mask().to_dense())


def test_valid_masks():
    mixed_mask().validate()
    (mixed_mask() | full_mask()).validate()
    BlockMask.from_token_mask(torch.rand(2, 64) < 0.5, 16, q_len=40).validate()
    BlockMask.from_dense(FULL.expand(2, 3, -1, -1), 40, 64, 16).validate()
    BlockMask.from_dense(FULL[:, :0], 40, 64, 16).validate()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            {"rows": lists([0, 2, 3], [0, 3, 1])},
            "BlockMask: rows has 2 lines; expected 3",
        ),
        (
            {"columns": lists([0, 1, 2, 3], [0, 1, 0])},
            "BlockMask: columns has 3 lines; expected 4",
        ),
        (
            {"rows": lists([1, 2, 3, 3], [0, 3, 1])},
            "BlockMask: rows.offsets starts above 0; expected 0",
        ),
        (
            {"rows": lists([0, 3, 2, 3], [0, 3, 1])},
            "BlockMask: rows.offsets falls; expected ascending",
        ),
        (
            {"rows": lists([0, 2, 3, 4], [0, 3, 1])},
            "BlockMask: rows.offsets ends at 4; expected at most the capacity, 3",
        ),
        (
            {"rows": lists([0, 2, 3, 3], [0, 4, 1])},
            "BlockMask: rows.indices leaves its range; expected 0 to 3",
        ),
        (
            {"rows": lists([0, 2, 3, 3], [0, 3, PAD_INDEX])},
            "BlockMask: rows.indices leaves its range; expected 0 to 3",
        ),
        (
            {"columns": lists([0, 1, 2, 2, 3], [0, 1, 3])},
            "BlockMask: columns.indices leaves its range; expected 0 to 2",
        ),
        (
            {"rows": lists([0, 2, 3, 3], [3, 0, 1])},
            "BlockMask: rows.indices does not rise within a line; "
            "expected ascending, each block once",
        ),
        (
            {"rows": lists([0, 2, 3, 3], [3, 3, 1])},
            "BlockMask: rows.indices does not rise within a line; "
            "expected ascending, each block once",
        ),
        (
            {"columns": lists([0, 1, 2, 2, 3], [0, 2, 0])},
            "BlockMask: columns is not the transpose of rows; expected the same blocks in both",
        ),
        (
            {"columns": lists([0, 1, 2, 2, 2], [0, 1])},
            "BlockMask: columns is not the transpose of rows; expected the same blocks in both",
        ),
    ],
)
def test_full_lists(change, sentence):
    assert message(replace(full_mask(), **change)) == sentence


def test_falling_indices_at_a_line_break_are_fine():
    blocks = torch.tensor([[[[0, 0, 0, 1], [1, 0, 0, 0], [0, 0, 0, 0]]]]).bool()
    mask = BlockMask.from_dense(blocks, 40, 64, 16)
    assert mask.rows.indices.flatten().tolist()[:2] == [3, 0]
    mask.validate()


def test_one_bad_head_among_many():
    mask = BlockMask.from_dense(FULL.repeat(2, 3, 1, 1), 40, 64, 16)
    indices = mask.rows.indices.clone()
    indices[1, 2, 1] = 2
    broken = replace(mask, rows=replace(mask.rows, indices=indices))
    assert message(broken).startswith("BlockMask: columns is not the transpose of rows")


def test_lists_of_different_batches():
    mask = full_mask()
    other = BlockMask.from_dense(FULL.repeat(2, 1, 1, 1), 40, 64, 16)
    assert "columns" in message(replace(mask, columns=other.columns))


@pytest.mark.parametrize(
    ("part", "changes", "sentence"),
    [
        (
            "partial_rows",
            {"indices": {1: 1}},
            "BlockMask: partial_rows.indices does not rise within a line; "
            "expected ascending, each block once",
        ),
        (
            "partial_rows",
            {"indices": {2: 9}},
            "BlockMask: partial_rows.indices leaves its range; expected 0 to 3",
        ),
        (
            "partial_rows",
            {"offsets": {1: 4, 2: 2}},
            "BlockMask: partial_rows.offsets falls; expected ascending",
        ),
        (
            "partial_columns",
            {"indices": {0: 0}},
            "BlockMask: partial_columns is not the transpose of partial_rows; "
            "expected the same blocks in both",
        ),
        (
            "partial_rows",
            {"slots": {1: 12}},
            "BlockMask: partial_rows.slots leaves its range; expected 0 to 11",
        ),
        (
            "partial_columns",
            {"slots": {0: -1}},
            "BlockMask: partial_columns.slots leaves its range; expected 0 to 11",
        ),
        (
            "partial_columns",
            {"slots": {0: 11}},
            "BlockMask: partial_columns.slots differs from partial_rows.slots; "
            "expected one slot per block",
        ),
    ],
)
def test_partial_lists(part, changes, sentence):
    mask = mixed_mask()
    assert mask.partial_rows.offsets.flatten().tolist() == [0, 0, 2, 3]
    assert mask.partial_rows.indices.flatten().tolist()[:3] == [1, 2, 2]
    assert message(replace(mask, **{part: edit(getattr(mask, part), **changes)})) == sentence


def test_a_block_listed_twice():
    mask = mixed_mask()
    blocks = torch.zeros(1, 1, 3, 4, dtype=torch.bool)
    blocks[0, 0, 1, 1] = True
    twice = BlockMask.from_dense(blocks, 40, 64, 16)
    broken = replace(mask, rows=twice.rows, columns=twice.columns)
    assert message(broken) == (
        "BlockMask: partial_rows lists a block that rows lists too; expected each block once"
    )


@pytest.mark.parametrize("part", ["partial_rows", "partial_columns"])
def test_slots_missing(part):
    mask = mixed_mask()
    broken = replace(mask, **{part: replace(getattr(mask, part), slots=None)})
    assert message(broken) == f"BlockMask: {part}.slots is missing; expected one per entry"


@pytest.mark.parametrize("part", ["partial_rows", "partial_columns", "token_bits"])
def test_partial_blocks_come_in_threes(part):
    with pytest.raises(ValueError) as error:
        replace(mixed_mask(), **{part: None})
    assert str(error.value) == (
        "BlockMask: partial_rows, partial_columns and token_bits are given in part; "
        "expected all three or none"
    )


@pytest.mark.parametrize(
    "shape", [(1, 1, 12, 16, 2), (1, 1, 12, 32, 1), (2, 1, 12, 16, 1), (12, 16, 1)], ids=str
)
def test_token_bits_of_the_wrong_shape(shape):
    """The batch here is 1, the block 16 x 16: one word for each of 16 rows."""
    broken = replace(mixed_mask(), token_bits=torch.zeros(shape, dtype=torch.int32))
    assert message(broken) == (
        f"BlockMask: token_bits has shape {list(shape)}; "
        "expected [B, H, slots, 16, 1], B=1, H=1 (from rows)"
    )


@pytest.mark.parametrize("part", ["rows", "columns", "partial_rows", "partial_columns"])
def test_lists_of_the_wrong_dtype(part):
    mask = mixed_mask()
    wide = replace(getattr(mask, part), indices=getattr(mask, part).indices.long())
    with pytest.raises((TypeError, ValueError)) as error:
        replace(mask, **{part: wide}).validate()
    assert str(error.value) == (
        f"BlockMask: {part}.indices has dtype torch.int64; expected torch.int32"
    )


@pytest.mark.parametrize(("column", "bit"), [(2, 16), (2, 31), (3, 12), (3, 16)])
def test_bits_of_keys_that_do_not_exist(column, bit):
    """Block column 2 ends at its 16th key, column 3 at key 60, its 12th."""
    keep = torch.zeros(1, 1, 40, 60, dtype=torch.bool)
    keep[..., 20, 40] = keep[..., 20, 50] = True
    mask = BlockMask.from_token_mask(keep, 16)
    mask.validate()
    bits = mask.token_bits.clone()
    slot = int(mask.block_states()[0, 0, 1, column])
    bits[0, 0, slot, 4] |= torch.tensor(1 << bit).int()
    assert message(replace(mask, token_bits=bits)) == (
        "BlockMask: token_bits shows a key past the end of its block; expected zero bits there"
    )
