"""One of several processes of test_distributed.py.

python distributed_worker.py RANK WORLD STORE HOST:METHOD ... computes the gradients of the same
models on this rank's share of a batch, with DDP and with FSDP2, and compares them with those of one
process on the whole batch. "model:hyspark" is HySparK as it is.
"""

import copy
import importlib.util
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from sparseattn.layers.method import Method
from sparseattn.structures.patch_mask import PatchMask


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


HERE = Path(__file__).resolve().parent
conftest = load(HERE.parent / "conftest.py")  # makes timm and transformers importable
hosts = load(HERE / "test_hosts.py")


def gradients(model, inputs, world=1):
    """Of a sum over all samples: DDP and FSDP2 take the mean over the ranks."""
    out = hosts.run(model, inputs)
    weights = torch.linspace(-1, 1, out.shape[-1], dtype=out.dtype)
    (world * (out * weights).sin().sum()).backward()
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            grad = parameter.grad
            grad = grad.full_tensor() if isinstance(grad, DTensor) else grad
            found[name.removeprefix("module.")] = grad
    return found


def shard(model):
    for module in list(model.modules()):
        if any(isinstance(child, Method) for child in module.children()):
            fully_shard(module)
    fully_shard(model)
    return model


class MaskedErrors(nn.Module):
    """HySparK's error of each volume [B, 1], with masks made of scores."""

    def __init__(self):
        super().__init__()
        from sparseattn.models import HySparK, HySparKConfig

        config = {"image_size": 32, "width": 2, "vit_depth": 1, "heads": 2, "decoder_width": 16}
        self.model = HySparK(HySparKConfig(**config, mask=0.5)).eval()  # batch norms mix volumes

    def forward(self, images, scores):
        return self.model(images, PatchMask.from_scores(scores, 4)).errors[:, None]


def converted(host, method):
    if host == "model":
        return MaskedErrors(), {
            "images": torch.rand(2, 1, 32, 32, 32),
            "scores": torch.rand(2, 2, 2, 2),
        }
    model, inputs = hosts.HOSTS[host]()
    report = hosts.convert(model, method, **hosts.METHODS[method])
    assert report.swapped and not report.skipped
    return model, inputs


def compare(rank, world, host, method):
    torch.manual_seed(0)
    model, inputs = converted(host, method)
    model, inputs = model.double(), hosts.wide(inputs)  # far from any rounding of other sums
    if next(iter(inputs.values())).shape[0] == 1:
        inputs = {name: torch.cat([x, x / 2]) for name, x in inputs.items()}
    whole = gradients(copy.deepcopy(model), inputs)
    share = {name: x.chunk(world)[rank] for name, x in inputs.items()}
    ddp = nn.parallel.DistributedDataParallel(copy.deepcopy(model), find_unused_parameters=True)
    for name, wrapped in (("ddp", ddp), ("fsdp2", shard(copy.deepcopy(model)))):
        found = gradients(wrapped, share, world)
        assert whole.keys() <= found.keys(), whole.keys() - found.keys()
        for key, value in whole.items():
            torch.testing.assert_close(found[key], value, msg=f"{host} {method} {name}: {key}")
        print(host, method, name, "agrees", flush=True)


def main(rank, world, store, pairs):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    torch.set_num_threads(1)
    for pair in pairs:
        compare(rank, world, *pair.split(":"))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4:])
