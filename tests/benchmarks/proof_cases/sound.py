"""An op that does everything right."""

from functools import partial

import torch

from proof.case import Case


def make(dtype, device, seed):
    random = torch.Generator(device).manual_seed(seed)
    return {
        "q": torch.randn((2, 5), generator=random, device=device).to(dtype),
        "scale": torch.rand((), generator=random, device=device).to(dtype),
    }


def call(q, scale):
    return q * scale, q.sum(1)


small = partial(
    Case,
    make=make,
    reference=call,
    results=("out", "sums"),
    gradients=("q", "scale"),
    batched=("q", "out", "sums"),
)
CASES = (small("only", "small", call=call),)
