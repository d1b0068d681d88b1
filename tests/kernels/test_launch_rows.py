"""Every input finds a launch row. That the rows compile and fit is for `make cubins`."""

import pytest

from sparseattn.kernels import launch
from sparseattn.kernels.block_attention import tuning

TABLES = {
    "forward": tuning.FORWARD,
    "dkv": tuning.BACKWARD_DKV,
    "dq": tuning.BACKWARD_DQ,
}


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("capability", [80, 86, 89, 90, 100, 120])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_every_head_dim_has_a_row(name: str, capability: int, itemsize: int) -> None:
    for head_dim in range(16, 257, 8):
        row = tuning.pick(TABLES[name], capability, itemsize, head_dim)
        assert row.itemsize == itemsize
        assert head_dim <= row.head_dim
        # a GPU of capability 12.0 has the small shared memory of 8.6: no Hopper row fits it
        assert row.capability == (90 if capability == 90 else 80)


def test_no_row_for_other_sizes() -> None:
    with pytest.raises(NotImplementedError, match="no launch row for capability 90, 8 bytes"):
        tuning.pick(tuning.FORWARD, 90, 8, 64)


@pytest.mark.parametrize(
    ("head_dim", "chunks"),
    [(16, (16, 0)), (24, (32, 0)), (32, (32, 0)), (40, (32, 16)), (48, (32, 16)), (56, (64, 0)),
     (64, (64, 0)), (72, (64, 16)), (80, (64, 16)), (96, (64, 32)), (104, (128, 0)),
     (128, (128, 0)), (160, (128, 32)), (192, (128, 64)), (200, (256, 0)), (256, (256, 0))],
)  # fmt: skip
def test_head_dims_are_split_where_that_wastes_less(head_dim: int, chunks: tuple[int, int]) -> None:
    assert launch.split_head_dim(head_dim) == chunks
    assert head_dim <= sum(chunks) <= 2 * head_dim


@pytest.mark.parametrize(("head_dim", "chunks"), [(40, (64, 0)), (64, (64, 0)), (72, (64, 16))])
def test_narrow_float32_is_not_split(head_dim: int, chunks: tuple[int, int]) -> None:
    assert launch.split_head_dim(head_dim, itemsize=4) == chunks


@pytest.mark.parametrize(("tile", "block", "fits"), [(128, 64, 64), (64, 256, 64), (64, 48, 16)])
def test_tiles_divide_blocks(tile: int, block: int, fits: int) -> None:
    assert launch.fit_tile(tile, block) == fits
    assert block % fits == 0
