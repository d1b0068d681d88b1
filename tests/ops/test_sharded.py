"""Attention on DTensors: two gloo ranks against the whole on one."""

import itertools
import subprocess
import sys
from collections.abc import Callable
from datetime import timedelta
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, init_device_mesh

from sparseattn import (
    BlockMask,
    block_sparse_attention,
    linear_attention,
    linformer_attention,
    nystrom_attention,
    performer_attention,
    saliency_attention,
    topk_attention,
)
from sparseattn.testing import landmarks, tolerance

CASES = {  # batch, heads, key heads, placement of q, what the output's placement must be
    "batch": (2, 4, 4, Shard(0), Shard(0)),
    "uneven batch": (3, 2, 2, Shard(0), Shard(0)),
    "batch of one": (1, 2, 2, Shard(0), Replicate()),
    "heads": (2, 4, 4, Shard(1), Shard(1)),
    "uneven heads": (2, 3, 3, Shard(1), Shard(1)),
    "grouped heads": (2, 4, 2, Shard(1), Shard(1)),
    "groups that no cut fits": (2, 4, 1, Shard(1), Replicate()),
    "tokens": (2, 2, 2, Shard(2), Replicate()),
    "whole": (2, 2, 2, Replicate(), Replicate()),
}


def engine(leaves, batch, heads, per):
    q, k, v, key_bias, block_gate = leaves
    tokens, key_mask = torch.rand(*per, 100, 90) < 0.4, some_keys(batch)
    tokens[..., 0] = True
    mask = BlockMask.from_token_mask(tokens, (32, 32))
    return block_sparse_attention(
        q, k, v, mask, key_mask=key_mask, key_bias=key_bias, block_gate=block_gate, return_lse=True
    )  # fmt: skip


def topk(leaves, batch, heads, per):
    q, k, v, gate = leaves
    always = torch.rand(*(() if per == (1, 1) else per), 4, 3) < 0.2
    keep = torch.randint(1, 3, (*per, 4)) if per == (1, 1) else 0.5
    return (
        topk_attention(
            q, k, v, keep, block_size=32, always=always, gate=gate, key_mask=some_keys(batch),
            query_mask=torch.rand(batch, 100) < 0.8, key_weight=torch.rand(batch, 90),
        ),
    )  # fmt: skip


def saliency(leaves, batch, heads, per):
    q, k, v, saliency, passthrough = leaves
    always = 2 if per == (1, 1) else torch.rand(90) < 0.1
    return (
        saliency_attention(
            q, k, v, saliency.sigmoid(), 0.4, always=always, key_mask=some_keys(batch),
            prune_queries=True, passthrough=passthrough,
        ),
    )  # fmt: skip


def without_pairs(function, *names, **options):
    """An op whose other tensors, of these names, serve the whole batch."""

    def call(leaves, batch, heads, per):
        q, k, v, *others = leaves
        beside = dict(zip(names, others, strict=True))
        return (function(q, k, v, key_mask=some_keys(batch), **beside, **options),)

    return call


def some_keys(batch):
    shown = torch.rand(batch, 90) < 0.8
    shown[:, 0] = True
    return shown


class Op(NamedTuple):
    call: Callable
    q_len: int
    lse: bool
    extras: Callable  # (batch, heads, key heads) -> name: leaf


OPS = {
    "block_sparse_attention": Op(engine, 100, True, lambda b, h, g: {
        "key_bias": torch.randn(b, 1, 90), "block_gate": torch.randn(b, h, 4, 3),
    }),
    "topk_attention": Op(topk, 100, False, lambda b, h, g: {"gate": torch.randn(h)}),
    "saliency_attention": Op(saliency, 90, False, lambda b, h, g: {
        "saliency": torch.randn(b, g, 90), "passthrough": torch.randn(b, h, 90, 16),
    }),
    "performer_attention": Op(
        without_pairs(performer_attention, "projection"), 100, False,
        lambda b, h, g: {"projection": torch.randn(8, 16)},
    ),
    "linformer_attention": Op(
        without_pairs(linformer_attention, "key_projection", "value_projection"), 100, False,
        lambda b, h, g: {
            "key_projection": torch.randn(g, 8, 90) / 9, "value_projection": torch.randn(8, 90) / 9,
        },
    ),
    "nystrom_attention": Op(
        without_pairs(nystrom_attention, "residual", num_landmarks=8, iterations=2), 90, False,
        lambda b, h, g: {"residual": torch.randn(g, 5)},
    ),
    "linear_attention": Op(without_pairs(linear_attention), 100, False, lambda b, h, g: {}),
}  # fmt: skip
# products of fewer heads may be rounded otherwise
WITHOUT_PAIRS = (
    "performer_attention",
    "linformer_attention",
    "nystrom_attention",
    "linear_attention",
)
RUNS = [  # op, name of the case, whether masks are each sample's and head's
    (op, name, mask_per)
    for op, name, mask_per in itertools.product(OPS, CASES, (False, True))
    if not (mask_per and op in WITHOUT_PAIRS)
]
# the whole one on every rank; others are replicated DTensors
PLAIN = ("key_bias", "gate", "projection", "value_projection", "residual")


def attend(op, leaves, seed, batch, heads, per, weights):
    """Return out and perhaps lse, and all gradients of a weighted sum of both."""
    torch.manual_seed(seed)  # of what has no gradient
    out, *others = OPS[op].call(leaves, batch, heads, per)
    ((out * weights).sum() + sum(other.sum() for other in others)).backward()
    return [x.detach() for x in (out, *others)] + [leaf.grad for leaf in leaves], out


def run_case(mesh, op, batch, heads, key_heads, placement, wanted, mask_per):
    q = torch.randn(batch, OPS[op].q_len, heads, 16).transpose(1, 2)
    k, v = torch.randn(2, batch, key_heads, 90, 16)
    extras = OPS[op].extras(batch, heads, key_heads)
    weights = torch.randn(q.shape)
    per = (batch, heads) if mask_per else (1, 1)
    results = []
    for dtype in (torch.float32, torch.float64):
        whole = [t.to(dtype, copy=True).requires_grad_() for t in (q, k, v, *extras.values())]
        results.append(attend(op, whole, 1, batch, heads, per, weights.to(dtype))[0])
    parts = [distribute_tensor(t, mesh, [placement]).requires_grad_() for t in (q, k, v)]
    for name, t in extras.items():
        whole = t.clone() if name in PLAIN else distribute_tensor(t, mesh, [Replicate()])
        parts.append(whole.requires_grad_())
    weights = distribute_tensor(weights, mesh, [placement])
    found, out = attend(op, parts, 1, batch, heads, per, weights)
    faults = [] if out.placements == (wanted,) else [f"out lies {out.placements}"]
    names = ("out", *["lse"] * OPS[op].lse, "dq", "dk", "dv", *(f"d{name}" for name in extras))
    for name, result, value, exact in zip(names, found, *results, strict=True):
        full = result.full_tensor() if isinstance(result, DTensor) else result
        if op in WITHOUT_PAIRS:
            faults += landmarks.judge(name, full, value, exact).faults
        elif name[1:] in PLAIN:  # summed over ranks, in another order
            faults += tolerance.judge(name, full, value, exact).faults
        elif not torch.equal(full, value):
            faults.append(f"{name} is off by {float((full - value).abs().max()):.1e}")
    return faults


def refuse(mesh):
    """What would attend to a part of the keys, or return what has no shards, is refused."""
    q = torch.randn(2, 2, 64, 16)
    whole = distribute_tensor(q, mesh, [Shard(0)])
    mask = BlockMask.from_dense(torch.ones(1, 1, 1, 1, dtype=torch.bool), 64, 64)
    some = torch.rand(2, 64)
    calls = {
        "k is a plain tensor; expected a DTensor": (block_sparse_attention, q, mask, {}),
        "return_mask is True": (topk_attention, whole, 0.5, {"return_mask": True}),
        "return_indices is True": (
            saliency_attention, whole, some, {"keep": 0.5, "return_indices": True},
        ),
        "legacy_start is True": (nystrom_attention, whole, 8, {"legacy_start": True}),
    }  # fmt: skip
    faults = []
    for text, (op, k, argument, options) in calls.items():
        try:
            op(whole, k, k, argument, **options)
            faults.append(f"passed: {text}")
        except (TypeError, NotImplementedError) as error:
            faults += [] if text in str(error) else [str(error)]
    return faults


def work(rank, folder):
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", 2)
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    mesh = init_device_mesh("cpu", (2,))
    report = {"refused": refuse(mesh)}
    for op, name, mask_per in RUNS:
        torch.manual_seed(0)
        report[f"{op}, {name}, {mask_per}"] = run_case(mesh, op, *CASES[name], mask_per)
    torch.save(report, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("ranks"))
    # programs of their own: a spawned process could not import this file by name
    commands = [[sys.executable, __file__, str(rank), folder] for rank in range(2)]
    ranks = [subprocess.Popen(command) for command in commands]
    assert [rank.wait(timeout=120) for rank in ranks] == [0, 0]
    return [torch.load(f"{folder}/{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize(("op", "name", "mask_per"), RUNS)
def test_shards_equal_the_whole(reports, op, name, mask_per):
    assert [report[f"{op}, {name}, {mask_per}"] for report in reports] == [[], []]


def test_what_has_no_shards_is_refused(reports):
    assert [report["refused"] for report in reports] == [[], []]


if __name__ == "__main__":
    work(int(sys.argv[1]), sys.argv[2])
