"""The tolerance rule, in one place (docs/decisions/0005-tolerance.md).

Three computations of one value: the result, the naive reference in the same dtype, and the truth,
which is the reference in float64. With e(x) = |x - truth|, a result passes when

    max  e(result) <= 2 * max  e(naive) + max  floor
    mean e(result) <= 2 * mean e(naive) + mean floor

and, whatever the errors are: shape and dtype are right, no NaN, infinities where the truth has
them, and exactly 0 where nothing is summed.

The floor is what rounding alone may do, element by element:

    floor = u * |truth| + t / 2 + roundings * a * magnitude
    roundings = max(SUM_ROUNDINGS, sequence * sqrt(terms))

    u          half the eps of the result's dtype: the result is rounded to it once
    t          the smallest positive number of that dtype: half of it is lost below the normal range
    a          half the eps of the dtype of the sums: float32, or float64 for float64
    magnitude  the size of the terms that are added up to give the element, the root of the sum of
               their squares. A value whose terms cancel, such as dq of a query with one key, is
               exactly 0 and yet computed with an error of this size.

Roundings have either sign, so n of them, each at most a * |term|, add up like a random walk: to
a * magnitude, times what the order of the sum costs. Over many shapes, masks and scales the
maximum error of float32 results came to 1-5 times a * magnitude and the mean error to 0.1-1.7
times, for the naive reference and for the op alike. SUM_ROUNDINGS = 4 covers a naive reference
that is lucky.

terms is how many there are, given for sums so long that their order matters: a naive reference may
add in blocks and err less than others. Added one after the other, as matrix units do, they err by
0.300 * sqrt(terms) in the root mean square, which is `sequence` for the mean; for the largest of M
errors it is `largest_sequence(M)` (docs/decisions/0009-long-sums.md).

In float64 the truth is no more exact than the result, so e(naive) cannot be seen; there the floor
stands in for it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

NAIVE_FACTOR = 2.0
SUM_ROUNDINGS = 4.0
SEQUENCE = (16 * math.log(2)) ** -0.5


@dataclass(frozen=True)
class Judgement:
    """What the rule says about one result; `faults` is empty if it passes."""

    name: str
    max_error: float
    max_allowed: float
    mean_error: float
    mean_allowed: float
    faults: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Say whether the result keeps the rule."""
        return not self.faults

    def __str__(self) -> str:
        """One line with both errors and what they may be."""
        verdict = "; ".join(self.faults) or "passes"
        return (
            f"{self.name}: max error {self.max_error:.3e} of {self.max_allowed:.3e}, "
            f"mean error {self.mean_error:.3e} of {self.mean_allowed:.3e}: {verdict}"
        )


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which values of `dtype` are summed."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def rounding_floor(
    truth: Tensor,
    dtype: torch.dtype,
    magnitude: Tensor | None = None,
    terms: Tensor | None = None,
    sequence: float = SEQUENCE,
) -> Tensor:
    """Return the error that rounding alone may cause in a result of `dtype`, per element.

    truth: float64, finite. magnitude, terms: float64 of the same shape, defaults |truth| and few.
    """
    size = truth.abs() if magnitude is None else magnitude
    own, sums = torch.finfo(dtype), torch.finfo(sum_dtype(dtype))
    last = own.smallest_normal * own.eps / 2
    roundings = torch.full_like(truth, SUM_ROUNDINGS)
    if terms is not None:
        roundings = roundings.maximum(sequence * terms.sqrt())
    floor = truth.abs() * (own.eps / 2) + size * roundings * (sums.eps / 2)
    return torch.where(size > 0, floor + last, 0)


def largest_sequence(elements: int) -> float:
    """Return what SEQUENCE is for the largest error of so many sums."""
    steps = [math.pi / 2 * step / 100 for step in range(1, 100)]
    wanted = math.log(2 * elements)
    return min((wanted - math.log(math.cos(s)) / 2) / s for s in steps) / math.sqrt(3)


def judge(
    name: str,
    result: Tensor,
    naive: Tensor,
    truth: Tensor,
    magnitude: Tensor | None = None,
    terms: Tensor | None = None,
) -> Judgement:
    """Hold one result against the rule.

    Args:
        name: what it is called in the judgement.
        result: what is tested.
        naive: the naive reference, computed in the dtype that the result is computed in.
        truth: the reference, computed in float64.
        magnitude: float64, see above; default |truth|. Where it is 0 nothing is summed.
        terms: float64, how many terms each element is summed of, where they are many.
    """
    if truth.dtype != torch.float64 or naive.shape != truth.shape:
        raise ValueError(f"{name}: truth must be float64 and shaped like naive")
    if bool(truth.isnan().any()) or bool((naive.isnan() & ~truth.isnan()).any()):
        raise ValueError(f"{name}: the reference itself gives NaN; no error can be measured")
    if result.shape != truth.shape:
        shapes = f"has shape {list(result.shape)}; expected {list(truth.shape)}"
        return Judgement(name, math.inf, 0.0, math.inf, 0.0, (shapes,))
    size = truth.abs() if magnitude is None else magnitude
    finite = truth.isfinite()
    if bool((naive.isinf() & finite).any()):
        raise ValueError(f"{name}: the naive reference overflows; choose smaller inputs")
    wide = result.double()
    faults = _plain_faults(wide, truth, finite, size)
    if not bool(finite.any()):
        return Judgement(name, 0.0, 0.0, 0.0, 0.0, tuple(faults))
    error = (wide - truth)[finite].abs()
    baseline = (naive.double() - truth)[finite].abs()
    counts = None if terms is None else terms[finite]
    errors, limits = [], []
    largest = largest_sequence(error.numel())
    for kind, pick, sequence in (("max", torch.max, largest), ("mean", torch.mean, SEQUENCE)):
        floor = rounding_floor(truth[finite], result.dtype, size[finite], counts, sequence)
        allowed = floor if naive.dtype == torch.float64 else baseline
        errors.append(float(pick(error)))
        limits.append(NAIVE_FACTOR * float(pick(allowed)) + float(pick(floor)))
        if not errors[-1] <= limits[-1]:  # an error of NaN is over, too
            faults.append(f"{kind} error is over ({_worst(wide, truth, finite)})")
    return Judgement(name, errors[0], limits[0], errors[1], limits[1], tuple(faults))


def require(*judgements: Judgement) -> None:
    """Raise AssertionError with every judgement if one of them fails."""
    if not all(judgement.passed for judgement in judgements):
        raise AssertionError("\n".join(str(judgement) for judgement in judgements))


def _plain_faults(wide: Tensor, truth: Tensor, finite: Tensor, size: Tensor) -> list[str]:
    faults = []
    if bool(wide.isnan().any()):
        faults.append(f"{int(wide.isnan().sum())} elements are NaN")
    if not torch.equal(torch.where(finite, 0.0, truth), torch.where(wide.isinf(), wide, 0.0)):
        faults.append("infinities are not where the truth has them")
    if bool((wide[finite & (size == 0)] != 0).any()):
        faults.append("not exactly 0 where nothing is summed")
    return faults


def _worst(wide: Tensor, truth: Tensor, finite: Tensor) -> str:
    error = (wide - truth).abs().masked_fill(~finite, 0).nan_to_num(nan=math.inf)
    place = tuple(int(i) for i in torch.unravel_index(error.argmax(), error.shape))
    return f"at {list(place)}: {float(wide[place]):.6e} for {float(truth[place]):.6e}"
