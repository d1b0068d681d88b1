"""Block-sparse attention on DTensors: two gloo ranks against the whole on one."""

import subprocess
import sys
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, init_device_mesh

from sparseattn import BlockMask, block_sparse_attention
from sparseattn.testing import tolerance

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
NAMES = ("out", "lse", "dq", "dk", "dv", "dkey_bias", "dblock_gate")


def attend(leaves, mask, key_mask, weights):
    """Return out, lse and all gradients of a weighted sum of both."""
    q, k, v, bias, gate = leaves
    out, lse = block_sparse_attention(
        q, k, v, mask, key_mask=key_mask, key_bias=bias, block_gate=gate, return_lse=True
    )
    ((out * weights).sum() + lse.sum()).backward()
    return [out.detach(), lse.detach(), *(leaf.grad for leaf in leaves)], out


def run_case(mesh, batch, heads, key_heads, placement, wanted, mask_per):
    q = torch.randn(batch, 100, heads, 16).transpose(1, 2)
    k, v = torch.randn(2, batch, key_heads, 90, 16)
    bias, gate = torch.randn(batch, 1, 90), torch.randn(batch, heads, 4, 3)
    weights, key_mask = torch.randn(batch, heads, 100, 16), torch.rand(batch, 90) < 0.8
    key_mask[:, 0] = True
    lead = (batch, heads) if mask_per else (1, 1)
    tokens = torch.rand(*lead, 100, 90) < 0.4
    tokens[..., 0] = True
    mask = BlockMask.from_token_mask(tokens, (32, 32))
    whole = [t.clone().requires_grad_() for t in (q, k, v, bias, gate)]
    expected, _ = attend(whole, mask, key_mask, weights)
    wide = [t.double().requires_grad_() for t in (q, k, v, bias, gate)]
    exact, _ = attend(wide, mask, key_mask, weights.double())
    parts = [distribute_tensor(t, mesh, [placement]).requires_grad_() for t in (q, k, v)]
    parts += [bias.clone().requires_grad_()]  # a plain tensor is the whole one
    parts += [distribute_tensor(gate, mesh, [Replicate()]).requires_grad_()]
    weights = distribute_tensor(weights, mesh, [placement])
    results, out = attend(parts, mask, key_mask, weights)
    faults = [] if out.placements == (wanted,) else [f"out lies {out.placements}"]
    for name, result, value in zip(NAMES, results, expected, strict=True):
        full = result.full_tensor() if isinstance(result, DTensor) else result
        if name == "dkey_bias":  # summed over ranks, in another order
            faults += tolerance.judge(name, full, value, exact[5]).faults
        elif not torch.equal(full, value):
            faults.append(f"{name} is off by {float((full - value).abs().max()):.1e}")
    return faults


def refuse(mesh):
    """Mixed arguments, which would attend to a part of the keys, are refused."""
    q = torch.randn(2, 2, 64, 16)
    whole = distribute_tensor(q, mesh, [Shard(0)])
    mask = BlockMask.from_dense(torch.ones(1, 1, 1, 1, dtype=torch.bool), 64, 64)
    try:
        block_sparse_attention(whole, q, q, mask)
    except TypeError as error:
        return [] if "k is a plain tensor; expected a DTensor" in str(error) else [str(error)]
    return ["a plain k beside a DTensor q passed"]


def work(rank, folder):
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", 2)
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    mesh = init_device_mesh("cpu", (2,))
    report = {"mixed": refuse(mesh)}
    for name, case in CASES.items():
        for mask_per in (False, True):
            torch.manual_seed(0)
            report[f"{name}, {mask_per}"] = run_case(mesh, *case, mask_per)
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


@pytest.mark.parametrize("mask_per", [False, True], ids=["one mask", "mask per head"])
@pytest.mark.parametrize("name", CASES)
def test_shards_equal_the_whole(reports, name, mask_per):
    assert [report[f"{name}, {mask_per}"] for report in reports] == [[], []]


def test_mixed_arguments_are_refused(reports):
    assert [report["mixed"] for report in reports] == [[], []]


if __name__ == "__main__":
    work(int(sys.argv[1]), sys.argv[2])
