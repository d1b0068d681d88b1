"""One of two processes of test_training.py: a checkpoint of a model that FSDP2 shards.

torchrun sharded_worker.py FOLDER trains two steps, saves, and trains one more; a new model that
continues from the checkpoint must end with the same bits, and one process must be able to load it.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from sparseattn.models import SparseAttnNet, SparseAttnNetConfig
from sparseattn.training import checkpoint
from sparseattn.training.loop import optimizer_groups

CONFIG = SparseAttnNetConfig(dim=16, heads=2, depth=1, coarse_width=4, embed_width=16, explore=0.0)


def make(seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = SparseAttnNet(CONFIG)
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    return model, torch.optim.AdamW(optimizer_groups(model, 0.1), lr=1e-2)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, number: int) -> None:
    generator = torch.Generator().manual_seed(10 * number + dist.get_rank())
    images = torch.rand(4, 1, 8, 8, generator=generator)
    optimizer.zero_grad()
    model(images, torch.arange(4)).loss.backward()
    optimizer.step()


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    model, optimizer = make(0)
    for number in range(2):
        step(model, optimizer, number)
    write = dist.get_rank() == 0  # whole tensors are gathered there alone
    path = checkpoint.save(folder, 2, model, optimizer, {"step": 2}, write=write)
    saved = checkpoint.weights(model)
    dist.barrier()
    step(model, optimizer, 2)
    whole = checkpoint.weights(model)
    other, again = make(1)
    checkpoint.load_model(path, other)
    if checkpoint.load_optimizer(path, other, again) != {"step": 2}:
        raise ValueError("the state of the checkpoint is another")
    step(other, again, 2)
    found = checkpoint.weights(other)
    if write and (not same(whole, found) or same(whole, saved)):
        raise ValueError("the model that continued is another")
    plain = SparseAttnNet(CONFIG)
    checkpoint.load_model(path, plain)
    if write and not same(saved, plain.state_dict()):
        raise ValueError("one process loads other weights")
    dist.destroy_process_group()
    print("agrees", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
