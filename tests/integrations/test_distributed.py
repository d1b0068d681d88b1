"""Converted models, and HySparK, under DistributedDataParallel and FSDP2: two processes, gloo."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

WORKER = Path(__file__).with_name("distributed_worker.py")
HOSTS = ["timm vit", "timm deit", "timm dinov2", "timm eva02", "hf vit", "hf dinov2", "hf bert"]
HOSTS += ["monai vit", "monai unetr"]
QUICK = ["torch encoder:topk", "hf vit:saliency", "model:hyspark"]
ALL = [f"{host}:topk" for host in HOSTS] + ["timm vit:saliency", "torch encoder:saliency"]


@pytest.mark.parametrize("pairs", [QUICK, pytest.param(ALL, marks=pytest.mark.slow)])
def test_two_processes_have_the_gradients_of_one(pairs, tmp_path):
    assert torch.distributed.is_gloo_available()
    store = str(tmp_path / "store")
    workers = [
        subprocess.Popen(
            [sys.executable, str(WORKER), str(rank), "2", store, *pairs],
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        printed = [worker.communicate(timeout=300)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [worker.returncode for worker in workers] == [0, 0]
    names = [pair.replace(":", " ") for pair in pairs]
    expected = [f"{name} {how} agrees" for name in names for how in ("ddp", "fsdp2")]
    assert [text.splitlines() for text in printed] == [expected] * 2
