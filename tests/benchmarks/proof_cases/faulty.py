"""One op with every fault; each case has one, and is caught by the check of its name."""

import itertools
import os
import time
from dataclasses import replace
from pathlib import Path

import torch

from proof.checks import CHECKS
from proof.discover import load

(SOUND,) = load(Path(__file__).with_name("sound.py"))
CALLS = itertools.count()
SEEN = {}


class HalfGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q):
        return q.clone()

    @staticmethod
    def backward(ctx, dout):
        return dout / 2


def off_by_one_part(q, scale):
    return q * scale * 1.001, q.sum(1)


def half_gradient(q, scale):
    return HalfGradient.apply(q) * scale, q.sum(1)


def uninitialised(q, scale):
    return q * scale + 0 * torch.empty_like(q), q.sum(1)


def other_bits(q, scale):
    return q * scale + next(CALLS) % 2 * 1e-3, q.sum(1)


def looks_at_mates(q, scale):
    return q * scale + q[1:].mean() * 1e-3, q.sum(1)


def reads_its_memory_once(q, scale):
    kept = SEEN.setdefault(q.data_ptr(), scale.detach().clone())
    return q * kept + 0 * scale, q.sum(1)


def breaks_the_graph(q, scale):
    return q * (scale if float(q.sum()) < 1e9 else scale + 1), q.sum(1)


def wrong_at_the_end(q, scale):
    return torch.cat([q[:-1] * scale, q[-1:] * scale * 1.5]), q.sum(1)


def ends_its_process(q, scale):
    os._exit(7)


def never_answers(q, scale):
    time.sleep(1000)


def raises(q, scale):
    raise RuntimeError("of its own")


CAUGHT_BY = {
    off_by_one_part: "numbers",
    half_gradient: "numbers",
    uninitialised: "numbers",
    other_bits: "repeat",
    looks_at_mates: "mates",
    reads_its_memory_once: "graph",
    breaks_the_graph: "compile",
    wrong_at_the_end: "huge",
    ends_its_process: "repeat",
    never_answers: "mates",
    raises: "sync",
}


def case(call, check):
    others = {name: "another check" for name in CHECKS if name != check}
    return replace(SOUND, name=f"{call.__name__}-{check}", call=call, skip=others)


CASES = tuple(case(call, check) for call, check in CAUGHT_BY.items())
