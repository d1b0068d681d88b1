"""The rule by which SparseAttnNet's share of pixels follows the loss."""

import math

from sparseattn import checks

_TINY = 1e-38


class KeepRule:
    """Adapts the share of pixels to the trend of the training loss, an epoch at a time.

    ::

        m = exponential mean of the losses
        trend = slope of m over `window` epochs * window / first loss
        every `every` epochs:   trend <= tolerance            keep <- keep * factor
                                trend >  tolerance, twice     keep <- keep / factor, and then hold

    keep stays within [low, high], and is not changed in the last `freeze` of the training. That
    k follows the trend is the paper's; the rule, its numbers and the floor of 15 % (the share that
    the paper reports) are choices made here. With a lower floor, a task on which the loss never
    worsens ends at that floor.
    """

    def __init__(
        self,
        start: float,
        low: float = 0.15,
        high: float = 0.5,
        factor: float = 0.85,
        every: int = 2,
        window: int = 4,
        tolerance: float = 0.02,
        smoothing: float = 0.5,
        freeze: float = 0.2,
    ) -> None:
        for name, share in (("low", low), ("high", high), ("factor", factor)):
            if not 0 < share <= 1:
                raise ValueError(f"KeepRule: {name} is {share}; expected a share in (0, 1]")
        if not low <= start <= high:
            raise ValueError(
                f"KeepRule: start is {start}; expected at least low and at most high, low={low}, "
                f"high={high}"
            )
        checks.require_int("KeepRule", "every", every, low=1)
        checks.require_int("KeepRule", "window", window, low=2)
        self.low, self.high, self.factor = low, high, factor
        self.every, self.window, self.tolerance = every, window, tolerance
        self.smoothing, self.freeze = smoothing, freeze
        self.keep = start
        self.means: list[float] = []
        self.worse, self.held, self.epochs, self.first = 0, False, 0, 0.0

    def update(self, loss: float, total: int) -> float:
        """Take the loss of one of `total` epochs; return the share of pixels for the next."""
        if not math.isfinite(loss):
            raise ValueError(f"KeepRule: loss is {loss}; expected a finite number")
        last = self.means[-1] if self.means else loss
        self.first = loss if self.epochs == 0 else self.first
        self.means.append(self.smoothing * last + (1 - self.smoothing) * loss)
        self.means = self.means[-self.window :]
        self.epochs += 1
        frozen = self.epochs >= (1 - self.freeze) * total
        if not (frozen or self.held or self.epochs % self.every or len(self.means) < self.window):
            self._judge()
        return self.keep

    def _judge(self) -> None:
        if self.trend() <= self.tolerance:
            self.worse = 0
            self.keep = max(self.keep * self.factor, self.low)
            return
        self.worse += 1
        if self.worse == 2:
            self.keep = min(self.keep / self.factor, self.high)
            self.held = True

    def trend(self) -> float:
        """Return the change of the mean loss over the window, by least squares, over the first.

        Over the latest loss, one near 0 would be worse again and again by noise alone.
        """
        count = len(self.means)
        centre = (count - 1) / 2
        products = sum((i - centre) * mean for i, mean in enumerate(self.means))
        slope = products / sum((i - centre) ** 2 for i in range(count))
        return slope * count / max(abs(self.first), _TINY)

    def state_dict(self) -> dict[str, object]:
        """Return what a resumed training needs, as JSON can hold it."""
        return {
            "keep": self.keep,
            "means": self.means,
            "first": self.first,
            "worse": self.worse,
            "held": self.held,
            "epochs": self.epochs,
        }

    def load_state_dict(self, state: dict) -> None:
        """Continue from a `state_dict`."""
        vars(self).update(state)
