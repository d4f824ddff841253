"""What dynamic selections compute at each threshold, layer by layer, as `calibrate_thresholds_` found it."""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import Any

from .errors import MoefyError


class ThresholdTables:
    """For one type of selection and each layer, the threshold that computes each share of the routed experts.

    Args:
        kind: of selection.
        experts: routed experts of each layer.
        measured: `Section.thresholds`.

    Raises:
        MoefyError: it was measured on another number of layers.
    """

    def __init__(self, kind: str, experts: Sequence[int], measured: Mapping[str, Any]):
        self.experts, self.shares, self.tables = experts, measured["share"], measured[kind]
        if len(self.tables) != len(experts):  # another head: an encoder alone, a decoder alone
            raise MoefyError(
                f"{kind!r} was measured on {len(self.tables)} layers, this model has {len(experts)}: "
                "call moefy_hf.calibrate_thresholds_(model, data)"
            )

    def thresholds(self, budgets: Sequence[float]) -> list[tuple[float, float]]:
        """Return for each layer's budget the threshold, and the experts that it computes on average.

        These are fewer where many experts need the very same threshold, as those of weight 0 do, so that it would
        compute many more than the budget.
        """
        pairs = []
        for k, experts, table in zip(budgets, self.experts, self.tables, strict=True):
            threshold = interpolated(k / experts, self.shares, table)
            if interpolated(threshold, table, self.shares) > k / experts + self.shares[1]:
                threshold = just_below(threshold)
                k = interpolated(threshold, table, self.shares) * experts
            pairs.append((threshold, k))
        return pairs

    def computed(self, thresholds: Sequence[float]) -> list[float]:
        """Return for each layer's threshold the experts that it computes on average."""
        layers = zip(thresholds, self.experts, self.tables, strict=True)
        return [interpolated(threshold, table, self.shares) * experts for threshold, experts, table in layers]

    def common_threshold(self, budget: float) -> float:
        """Return the one threshold that computes `budget` experts over all layers; fewer, as in `thresholds`."""
        low, high = min(table[0] for table in self.tables), max(table[-1] for table in self.tables)
        for _ in range(60):
            middle = (low + high) / 2
            less = sum(self.computed([middle] * len(self.tables))) < budget
            low, high = (middle, high) if less else (low, middle)
        much = sum(self.computed([high] * len(self.tables))) > budget + self.shares[1] * sum(self.experts)
        return just_below(high) if much else high


def just_below(threshold: float) -> float:
    """Return less than a threshold, also where a table's rounding raised it."""
    return threshold - 1e-4 * max(1.0, abs(threshold))


def interpolated(x: float, xs: Sequence[float], ys: Sequence[float]) -> float:
    """Return y at x of the piecewise linear function through (xs, ys), constant outside; xs do not decrease."""
    right = bisect_right(xs, x)
    if right == 0:
        return ys[0]
    if right == len(xs):
        return ys[-1]
    (x0, x1), (y0, y1) = xs[right - 1 : right + 1], ys[right - 1 : right + 1]
    return y0 + (y1 - y0) * (x - x0) / (x1 - x0)
