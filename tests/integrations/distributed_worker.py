"""One of several processes of test_distributed.py: python distributed_worker.py RANK WORLD STORE.

Trains the same model on its share of a batch with DDP and with FSDP2, and rank 0 compares the
gradients with those of one process on the whole batch.
"""

import copy
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from sparseattn import convert


def make_model():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 2, 64, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    report = convert(model, "topk", keep=0.25, block_size=16, fallback="never")
    assert len(report.swapped) == 2
    return model


def gradients(model, x):
    model(x).square().mean().backward()
    whole = {}
    for name, parameter in model.named_parameters():
        grad = parameter.grad
        whole[name.removeprefix("module.")] = (
            grad.full_tensor() if isinstance(grad, DTensor) else grad
        )
    return whole


def main(rank, world, store):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    torch.set_num_threads(1)
    model = make_model()
    x = torch.randn(4, 70, 32)
    expected = gradients(copy.deepcopy(model), x)
    share = x.chunk(world)[rank]
    ddp = nn.parallel.DistributedDataParallel(copy.deepcopy(model))
    sharded = copy.deepcopy(model)
    for layer in sharded.layers:
        fully_shard(layer)
    fully_shard(sharded)
    for name, wrapped in (("ddp", ddp), ("fsdp2", sharded)):
        found = gradients(wrapped, share)
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, msg=f"{name}: {key}")
        print(name, "agrees", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
