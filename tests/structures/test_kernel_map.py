"""KernelMap and sets of sites against their definition, site by site, tap by tap."""

import itertools

import hypothesis
import hypothesis.strategies as st
import pytest
import torch

from sparseattn.structures import site_lookup
from sparseattn.structures.kernel_map import KernelMap, kernel_map
from sparseattn.structures.site_lookup import Window
from sparseattn.structures.site_sets import SiteSet, grown, touched

TRITON_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
QUICK = hypothesis.settings(
    derandomize=True, phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate]
)


def sites(shape, batch=2, share=0.4, shuffle=True):
    places = (torch.rand(batch, *shape) < share).nonzero().int()
    return SiteSet(places[torch.randperm(len(places))] if shuffle else places, shape, batch, [])


def window(kernel=(3, 3, 3), stride=(1, 1, 1), low=None, dilation=(1, 1, 1)):
    spans = [d * (k - 1) // 2 for k, d in zip(kernel, dilation, strict=True)]
    return Window(kernel, stride, tuple(spans) if low is None else low, dilation)


def read_by(place, window):
    """The places that a coarse site reads, tap by tap."""
    for taps in itertools.product(*map(range, window.kernel)):
        steps = zip(place[1:], window.stride, window.low, taps, window.dilation, strict=True)
        yield (place[0], *(y * s - low + t * d for y, s, low, t, d in steps))


def rows_by_definition(fine, coarse, window):
    number = {tuple(place): row for row, place in enumerate(fine.coordinates.tolist())}
    columns = [
        [number.get(read, -1) for read in read_by(place, window)]
        for place in coarse.coordinates.tolist()
    ]
    return torch.tensor(columns, dtype=torch.int32).view(-1, window.taps).mT


SHAPE = (4, 5, 6)
CASES = {
    "submanifold": (sites(SHAPE), None, window()),
    "one-tap": (sites(SHAPE), None, window((1, 1, 1))),
    "even": (sites(SHAPE), None, window((2, 4, 2))),
    "wide-dilated": (sites(SHAPE), None, window((5, 3, 5), dilation=(1, 2, 3))),
    "ascending": (sites(SHAPE, shuffle=False), None, window()),
    "strided": (sites(SHAPE), sites((2, 3, 3), share=0.7), window(stride=(2, 2, 2))),
    "no-padding": (sites(SHAPE), sites((2, 3, 4)), window(low=(0, 0, 0))),
    "wide-padding": (sites(SHAPE), sites((9, 9, 9), share=0.1), window(low=(4, 3, 3))),
    "other-stride": (
        sites(SHAPE), sites((2, 5, 2)), window((2, 1, 3), (2, 1, 3), (0, 0, 1), (1, 1, 2)),
    ),
    "full": (sites(SHAPE, share=2.0), None, window()),
    "no-sites": (sites(SHAPE, share=-1.0), None, window()),
    "nobody-to-read": (sites(SHAPE, share=-1.0), sites(SHAPE), window()),
    "nobody-reads": (sites(SHAPE), sites(SHAPE, share=-1.0), window()),
    "no-samples": (sites(SHAPE, batch=0), None, window()),
    "one-voxel": (sites((1, 1, 1), 1, share=2.0), None, window()),
    "one-line": (sites((1, 1, 9), 3), None, window()),
}  # fmt: skip


@pytest.mark.parametrize("method", ["table", "search", "auto"])
@pytest.mark.parametrize("case", CASES)
def test_rows(case, method):
    fine, coarse, taps = CASES[case]
    coarse = fine if coarse is None else coarse
    found = KernelMap.between(fine, coarse, taps, method)
    assert torch.equal(found.rows, rows_by_definition(fine, coarse, taps))
    assert found.rows.dtype == torch.int32 and found.rows.is_contiguous()
    assert found.num_inputs == len(fine.coordinates)
    assert found.symmetric == (coarse is fine and case not in ("even",))


def moved(place, device):
    """The same sites on another device, with nothing known of them."""
    return SiteSet(place.coordinates.to(device), place.spatial_shape, place.batch_size, [])


def by_kernel(fine, coarse, taps, method):
    """Rows as a GPU makes them: by the kernels of both methods."""
    near = moved(fine, TRITON_DEVICE)
    far = near if coarse is fine else moved(coarse, TRITON_DEVICE)
    sizes = [[s.batch_size, *s.spatial_shape] for s in (near, far)]
    box = site_lookup.Box.around(sizes[0][0], sizes[0][1:], sizes[1][1:], taps)
    given = near.coordinates, far.coordinates, *sizes, box, taps, method == "hash", near is far
    return site_lookup.by_kernel(*given).cpu()


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("method", ["table", "hash"])
@pytest.mark.parametrize("case", CASES)
def test_rows_by_kernels(case, method):
    fine, coarse, taps = CASES[case]
    coarse = fine if coarse is None else coarse
    found = by_kernel(fine, coarse, taps, method)
    assert torch.equal(found, rows_by_definition(fine, coarse, taps))
    assert found.dtype == torch.int32 and found.is_contiguous()


def test_what_is_found_does_not_depend_on_who_is_entered_first():
    """Sites whose searches all begin at one slot: every order of entering gives other places."""
    key, shift, last = torch.arange(2**20), 64 - 6, 63
    start = (key * -7046029254386353131 >> shift) & last
    key = key[start == 5][torch.randperm(40)]  # of at most 32 slots that 16 sites would take
    places = torch.stack((0 * key, key // 512**2, key // 512 % 512, key % 512), 1)[:30].int()
    taps = Window((1, 1, 1), (1, 1, 1), (0, 0, 0), (1, 1, 1))
    for order in (torch.arange(30), torch.randperm(30)):
        fine = SiteSet(places[order], (512,) * 3, 1, [])
        coarse = SiteSet(places, (512,) * 3, 1, [])
        assert torch.equal(by_kernel(fine, coarse, taps, "hash")[0], order.argsort().int())


@pytest.mark.parametrize("method", ["table", "hash"])
@pytest.mark.skipif(TRITON_DEVICE == "cuda", reason="an assertion there ends the process")
def test_kernels_find_wrong_coordinates(method):
    fine, coarse = sites(SHAPE), sites((2, 3, 3))
    half = window(stride=(2, 2, 2))
    for wrong in ([0, 4, 0, 0], [2, 0, 0, 0], [0, 0, -1, 0], [0, 0, 0, 6]):
        places = fine.coordinates.clone()
        places[7] = torch.tensor(wrong)
        message = rf"coordinates\[7\] is .{str(wrong)[1:-1]}.; expected 0 <= coordinate"
        with pytest.raises(ValueError, match=message):
            by_kernel(fine._replace(coordinates=places), coarse, half, method)
        places = coarse.coordinates.clone()
        places[3] = torch.tensor(wrong)
        with pytest.raises(ValueError, match=r"coordinates\[3\] is .*; expected 0 <= coordinate"):
            by_kernel(fine, coarse._replace(coordinates=places), half, method)
    for first, second in ((True, False), (False, True)):
        near, far = fine.coordinates.clone(), coarse.coordinates.clone()
        near[-1], far[-1] = near[2 if first else -1], far[1 if second else -1]
        with pytest.raises(ValueError, match=rf", as coordinates\[{2 if first else 1}\] is"):
            by_kernel(
                fine._replace(coordinates=near), coarse._replace(coordinates=far), half, method
            )


def test_keys_of_large_volumes_take_64_bits():
    """More than 2^31 cells: no key wraps around."""
    corner = torch.tensor([[0, 0, 0, 0], [0, 2047, 2047, 1023], [1, 0, 0, 0], [1, 2047, 0, 1023]])
    near = torch.cat((corner, corner + torch.tensor([0, 0, 1, 0]) * (corner[:, 2:3] == 0)))
    fine = SiteSet(near.unique(dim=0).int(), (2048, 2048, 1024), 2, [])
    box = site_lookup.Box.around(2, fine.spatial_shape, fine.spatial_shape, window())
    assert box.cells > 2**31 and site_lookup.choose(box, len(near), "cpu") == "search"
    expected = rows_by_definition(fine, fine, window())
    assert torch.equal(KernelMap.between(fine, fine, window()).rows, expected)
    assert torch.equal(by_kernel(fine, fine, window(), "hash"), expected)


def test_way_of_looking_up_goes_by_volume():
    def ways(size, device):
        box = site_lookup.Box.around(1, (size,) * 3, (size,) * 3, window())
        return [site_lookup.choose(box, count, device) for count in (100, 10_000, 10_000_000)]

    assert ways(64, "cpu") == ["search", "table", "table"]
    assert ways(64, "cuda") == ["table", "table", "table"]  # as small as 2^24 cells
    assert ways(512, "cuda") == ["hash", "hash", "table"]
    assert ways(2**18, "cuda") == ["hash", "search", "search"]  # 55 bits a key, 8 for a row


@pytest.mark.parametrize("case", CASES)
def test_pairs_transposed_and_sorted_hold_the_same(case):
    fine, coarse, taps = CASES[case]
    coarse = fine if coarse is None else coarse
    plain = KernelMap.between(fine, coarse, taps)
    expected = {(t, int(i), o) for t, row in enumerate(plain.rows) for o, i in enumerate(row)}
    expected = {pair for pair in expected if pair[1] >= 0}
    by_taps = plain.sorted_by_taps()
    for made in (plain, by_taps):
        pairs = made.pairs()
        ends = pairs.offsets.tolist()
        found = [
            (t, int(pairs.inputs[at]), int(pairs.outputs[at]))
            for t in range(taps.taps)
            for at in range(ends[t], ends[t + 1])
        ]
        assert len(found) == len(expected) and set(found) == expected
        back = made.transposed()
        turned = {(t, o, i) for t, row in enumerate(back.rows.tolist()) for i, o in enumerate(row)}
        assert {pair for pair in turned if pair[1] >= 0} == {(t, o, i) for t, i, o in expected}
        assert back.num_inputs == made.num_outputs
    if plain.symmetric:
        assert torch.equal(plain.transposed().rows, plain.rows.flip(0))
    order = by_taps.order.long()
    assert torch.equal(order.sort().values, torch.arange(plain.num_outputs))
    assert torch.equal(by_taps.rows, plain.rows[:, order])
    assert by_taps.sorted_by_taps() is by_taps


@pytest.mark.parametrize("taps", [window(), window((5, 3, 5))])  # 75 taps: two words to sort by
def test_sorted_columns_share_lists_of_taps(taps):
    fine = sites((9, 10, 11), share=0.2)
    found = KernelMap.between(fine, fine, taps).sorted_by_taps()
    there = found.rows >= 0
    for number, (count, *listed) in enumerate(found.lists.tolist()):
        live = there[:, number * 128 : (number + 1) * 128].any(1).nonzero()[:, 0].tolist()
        assert listed[:count] == live
    assert len(found.lists) == -(-found.num_outputs // 128)
    # a Gray code: read as a number and decoded, it rises from column to column
    rare = there.sum(1).argsort(stable=True)  # the first tap counts most
    codes = [int("".join(map(str, column)), 2) for column in there[rare].mT.int().tolist()]
    decoded = []
    for code in codes:
        shifted = code
        while shifted := shifted >> 1:
            code ^= shifted
        decoded.append(code)
    assert decoded == sorted(decoded)


def test_sorting_lets_tiles_skip_taps():
    """A sphere's shell: the taps that all lists of 128 sites walk, sorted and in raster order."""
    grid = torch.stack(torch.meshgrid(*[torch.arange(96.0)] * 3, indexing="ij"), -1) - 47.5
    active = (grid.norm(dim=-1) - 45).abs() < 0.87
    fine = SiteSet(torch.nn.functional.pad(active.nonzero(), (1, 0)).int(), (96, 96, 96), 1, [])
    found = KernelMap.between(fine, fine, window())
    walked = found.sorted_by_taps().lists[:, 0].sum() * 128
    plain = torch.nn.functional.pad(found.rows >= 0, (0, -found.num_outputs % 128))
    raster = plain.unflatten(1, (-1, 128)).any(2).sum() * 128
    pairs = (found.rows >= 0).sum()
    assert 1.6 * pairs < raster and pairs <= walked < 1.25 * pairs


@pytest.mark.parametrize("what", ["touched", "grown"])
@pytest.mark.parametrize("tabled", [True, False])
@QUICK
@hypothesis.given(st.data())
def test_derived_sites(what, tabled, data):
    draw = data.draw
    numbers = {
        name: tuple(draw(st.integers(low, high)) for _ in range(3))
        for name, low, high in (
            ("kernel", 1, 4),
            ("stride", 1, 3),
            ("low", 0, 3),
            ("dilation", 1, 3),
        )
    }
    taps = Window(**numbers)
    shape, other = (tuple(draw(st.integers(1, 7)) for _ in range(3)) for _ in range(2))
    near = sites(shape, batch=draw(st.integers(0, 2)), share=draw(st.sampled_from([0.1, 0.5, 2.0])))
    with pytest.MonkeyPatch.context() as patch:
        if not tabled:
            patch.setattr("sparseattn.structures.site_sets.SMALLEST_TABLE", 0)
            patch.setattr("sparseattn.structures.site_sets.MARKS_PER_SITE", 0)
            patch.setattr("sparseattn.structures.site_sets.GROWTH", draw(st.sampled_from([1, 4])))
        found = {"touched": touched, "grown": grown}[what](near, taps, other)
    place = torch.nonzero(torch.ones(near.batch_size, *other)).tolist()
    active = {tuple(p) for p in near.coordinates.tolist()}
    if what == "touched":
        expected = [p for p in place if any(read in active for read in read_by(p, taps))]
    else:
        reached = {read for p in active for read in read_by(p, taps)}
        expected = [p for p in place if tuple(p) in reached]
    assert found.coordinates.tolist() == expected and found.coordinates.dtype == torch.int32
    assert found.spatial_shape == other and found.batch_size == near.batch_size


def test_what_was_made_is_kept():
    fine, coarse = sites(SHAPE), sites((2, 3, 3))
    taps, half = window(), window(stride=(2, 2, 2))
    assert touched(fine, half, (2, 3, 3)) is touched(fine, half, (2, 3, 3))
    assert touched(fine, half, (2, 3, 3)) is not touched(fine, half, (2, 2, 3))
    options = [
        (fine, coarse, half, back, sort) for back in (False, True) for sort in (False, True)
    ] + [(fine, fine, taps, False, False)]
    made = [kernel_map(f, c, w, backwards=b, sort=s) for f, c, w, b, s in options]
    again = [kernel_map(f, c, w, backwards=b, sort=s) for f, c, w, b, s in options]
    assert all(first is second for first, second in zip(made, again, strict=True))
    assert len(set(map(id, made))) == len(made)
    assert kernel_map(fine, fine, taps, backwards=True, sort=False) is made[-1]
    other = SiteSet(coarse.coordinates.clone(), coarse.spatial_shape, 2, [])
    assert kernel_map(fine, other, half, backwards=False, sort=False) is not made[0]


def test_opcheck():
    fine, coarse = sites((3, 3, 4), share=0.3), sites((2, 2, 2))
    for coordinates, same in ((coarse.coordinates, False), (fine.coordinates, True)):
        shape = [3, 3, 4] if same else [2, 2, 2]
        torch.library.opcheck(
            torch.ops.sparseattn.neighbour_rows.default,
            (fine.coordinates, coordinates, [3, 3, 4], shape, 2, window().pack(), "auto", same),
        )
    torch.library.opcheck(
        torch.ops.sparseattn.derived_sites.default,
        (fine.coordinates, [3, 3, 4], [2, 2, 2], 2, window(stride=(2, 2, 2)).pack(), False),
    )
