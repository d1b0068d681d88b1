"""BlockMask without values: fake tensors, torch.compile and export see shapes alone."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sparseattn import BlockMask

BLOCK = 16


def tensors(mask):
    found = []
    mask.map(lambda tensor: found.append(tensor) or tensor)
    return found


def from_dense(blocks, scores, keep):
    return BlockMask.from_dense(blocks, 70, 90, BLOCK)


def from_count(blocks, scores, keep):
    return BlockMask.from_block_scores(scores, 2, 70, 90, BLOCK)


def from_fraction(blocks, scores, keep):
    return BlockMask.from_block_scores(scores, 0.3, 70, 90, BLOCK)


def from_scores_and_always(blocks, scores, keep):
    return BlockMask.from_block_scores(scores, 2, 70, 90, BLOCK, blocks[:1])


def from_tokens(blocks, scores, keep):
    return BlockMask.from_token_mask(keep, (BLOCK, 2 * BLOCK))


def from_keys(blocks, scores, keep):
    return BlockMask.from_token_mask(keep[:, 0, 0], BLOCK, q_len=70)


def union(blocks, scores, keep):
    left = from_dense(blocks, scores, keep) | from_keys(blocks, scores, keep)
    return left | BlockMask.from_token_mask(keep, BLOCK)


def intersection(blocks, scores, keep):
    left = from_count(blocks, scores, keep) & from_keys(blocks, scores, keep)
    return left & BlockMask.from_token_mask(keep, BLOCK)


BUILDERS = [
    from_dense,
    from_count,
    from_fraction,
    from_scores_and_always,
    from_tokens,
    from_keys,
    union,
    intersection,
]


def inputs():
    """5 x 6 blocks of 70 x 90 tokens."""
    blocks = torch.rand(2, 3, 5, 6) < 0.4
    return blocks, torch.randn(2, 3, 5, 6), torch.rand(2, 3, 70, 90) < 0.5


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("build", BUILDERS)
def test_fake_tensors(build):
    """.item(), nonzero() and their like raise here, so nothing can wait for a device."""
    real = build(*inputs())
    mode = FakeTensorMode()
    with mode:
        fake = build(*(mode.from_tensor(tensor) for tensor in inputs()))
        dense, density, states = fake.to_dense(), fake.density(), fake.block_states()
        fake.to_flex()
    pairs = zip(tensors(fake), tensors(real), strict=True)
    assert all((a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride()) for a, b in pairs)
    assert (dense.shape, dense.dtype) == (real.to_dense().shape, torch.bool)
    assert (density.shape, density.dtype) == ((), torch.float64)
    assert (states.shape, states.dtype) == (real.block_states().shape, torch.int32)


@pytest.mark.parametrize("build", BUILDERS)
def test_meta_tensors(build):
    mask = build(*(tensor.to("meta") for tensor in inputs()))
    real = build(*inputs())
    assert mask.device.type == "meta"
    assert [t.shape for t in tensors(mask)] == [t.shape for t in tensors(real)]
    assert mask.to_dense().shape == real.to_dense().shape


@pytest.mark.parametrize("build", BUILDERS)
def test_compiled_builders(build):
    arguments = inputs()
    found = torch.compile(build, fullgraph=True, backend="aot_eager")(*arguments)
    assert isinstance(found, BlockMask)
    pairs = list(zip(tensors(found), tensors(build(*arguments)), strict=True))
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("build", [from_count, from_tokens])
def test_compiled_readers(build):
    @torch.compile(fullgraph=True, backend="aot_eager")
    def read(mask):
        return mask.to_dense(), mask.density(), (mask | mask).block_states()

    mask = build(*inputs())
    dense, density, states = read(mask)
    assert torch.equal(dense, mask.to_dense())
    assert torch.equal(density, mask.density())
    assert torch.equal(states.clamp(max=0), mask.block_states().clamp(max=0))


def test_compiled_in_inference_mode():
    scores = torch.randn(1, 2, 5, 6)
    build = torch.compile(lambda s: from_count(None, s, None), fullgraph=True, backend="aot_eager")
    with torch.inference_mode():
        found = build(scores)
    assert torch.equal(found.rows.indices, from_count(None, scores, None).rows.indices)


@pytest.mark.parametrize("keep", [3, 0.25], ids=str)
def test_two_compiles_serve_all_lengths(keep):
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, backend=counter, dynamic=None)
    def build(scores, q_len, k_len):
        mask = BlockMask.from_block_scores(scores, keep, q_len, k_len, BLOCK)
        return mask.rows.offsets, mask.rows.indices, mask.columns.offsets, mask.columns.indices

    for length in range(101, 1001, 47):  # 20 lengths
        other = length + 33
        scores = torch.randn(2, 1, -(-length // BLOCK), -(-other // BLOCK))
        mask = BlockMask.from_block_scores(scores, keep, length, other, BLOCK)
        expected = mask.rows, mask.columns
        expected = [t for part in expected for t in (part.offsets, part.indices)]
        found = build(scores, length, other)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert counter.frame_count <= 2


def test_two_compiles_serve_all_token_masks():
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, backend=counter)
    def build(keep):
        return BlockMask.from_token_mask(keep, BLOCK).to_dense()

    for length in range(20, 300, 29):
        keep = torch.rand(2, 1, length, length + 3) < 0.5
        assert torch.equal(build(keep), keep)
    assert counter.frame_count <= 2


def test_gradients_pass_beside_the_mask():
    """A compiled function may choose blocks by the scores that it also differentiates."""

    @torch.compile(fullgraph=True, backend="aot_eager")
    def loss(scores):
        mask = BlockMask.from_block_scores(scores, 2, 70, 90, BLOCK)
        return (scores * (mask.block_states() != -1)).square().sum()

    scores = torch.randn(2, 3, 5, 6, requires_grad=True)
    loss(scores).backward()
    kept = BlockMask.from_block_scores(scores, 2, 70, 90, BLOCK).block_states() != -1
    assert torch.equal(scores.grad, 2 * scores.detach() * kept)


def test_export():
    class Build(torch.nn.Module):
        def forward(self, scores):
            mask = BlockMask.from_block_scores(scores, 2, 70, 90, BLOCK)
            return mask.to_dense(), mask.rows.indices

    _, scores, _ = inputs()
    program = torch.export.export(Build(), (scores,))
    for found, expected in zip(program.module()(scores), Build()(scores), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("shape", [(2, 3, 5, 6), (1, 1, 1, 1), (1, 2, 0, 4)], ids=str)
def test_operator_is_registered_well(shape):
    blocks = torch.rand(shape) < 0.4
    operator = torch.ops.sparseattn.block_lists.default
    for tensor in (blocks, blocks.mT, blocks[:1, :1].expand(2, 2, *shape[2:])):
        torch.library.opcheck(operator, (tensor, shape[2] * shape[3]))


def test_no_tensor_of_int64_has_the_size_of_the_grid():
    made = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            made.extend(leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor))
            return out

    blocks = torch.rand(1, 2, 50, 60) < 0.1
    with Watch():
        BlockMask.from_dense(blocks, 800, 960, BLOCK)
    assert made
    assert all(tensor.dtype in (torch.int32, torch.bool) for tensor in made)
    with Watch():
        BlockMask.from_block_scores(torch.randn(1, 2, 50, 60), 5, 800, 960, BLOCK)
    wide = [t for t in made if t.dtype == torch.int64]
    assert all(tensor.numel() <= 1 * 2 * 50 * 5 for tensor in wide)  # top-k's own indices
