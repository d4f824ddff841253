"""How the layers share one budget, by what was measured of them."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

ALPHA = 128 * 1024 / 1e4  # of CFSP: its code takes sums over 128 texts of 1024 tokens, divided by 1e4, and a = 1


def allocate_budget(
    allocation: str, measured: Mapping[str, Any] | None, experts: Sequence[int], least: int, budget: int
) -> list[int]:
    """Return k of each layer, from `least` to its E, `budget` over all, by what was measured for an allocation.

    Raises:
        ValueError: nothing was measured for it, or another number of layers.
    """
    if measured is None:
        raise ValueError(
            f'allocation "{allocation}" needs measured layers: call '
            f'moefy_hf.allocate_budgets_(model, data, allocation="{allocation}") first'
        )
    layers = len(next(iter(measured.values())))
    if layers != len(experts):  # another head: an encoder alone, a decoder alone
        raise ValueError(
            f'what allocation "{allocation}" needs was measured on {layers} layers, this model has {len(experts)}: '
            'use allocation "uniform"'
        )
    return MEASURED[allocation](measured, experts, least, budget)


def by_sensitivity(measured: Mapping[str, Any], experts: Sequence[int], least: int, budget: int) -> list[int]:
    """Give more experts to layers whose restriction moves the predictions more."""
    return allocate(measured["k"], measured["loss"], budget)


def by_angle(measured: Mapping[str, Any], experts: Sequence[int], least: int, budget: int) -> list[int]:
    """The coarse part of CFSP (Wang et al., COLING 2025): how much of each layer is kept.

    The share of its experts that a layer gets is proportional to sigmoid(ALPHA (I - mean of I)), with I its
    importance: the mean angular distance between the hidden states that it is given and returns. Formula and ALPHA
    are those of the authors' code, which keeps shares of neurons. Where it would keep more than all of a layer, it
    moves all shares towards their mean; here such a layer gets its E experts, and the others more in proportion.
    """
    angles = measured["distance"]
    mean = sum(angles) / len(angles)
    weights = [e / (1 + math.exp(ALPHA * (mean - angle))) for e, angle in zip(experts, angles, strict=True)]
    return apportion(weights, experts, least, budget)


def allocate(grids: Sequence[Sequence[int]], losses: Sequence[Sequence[float]], budget: int) -> list[int]:
    """Spend `budget` experts over layers so that the summed loss is least, each layer's loss being known at a few k.

    Between measured points a layer's loss is taken as the lower convex hull of its points; on convex curves the greedy
    choice, always the layer whose next expert saves most, is optimal.

    Args:
        grids: for each layer, the measured k, increasing; the last is E. A layer gets at least its first one.
        losses: for each layer, the loss with this layer alone restricted to that k.
        budget: experts to spend over all layers; raised to the sum of the first entries where smaller.
    """
    steps = []  # (loss per expert, turn, layer), one expert each; a hull's slopes rise, a layer's steps stay in order
    for layer, (ks, loss) in enumerate(zip(grids, losses, strict=True)):
        hull: list[tuple[int, float]] = []
        for point in zip(ks, loss, strict=True):
            while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-1], point):
                hull.pop()
            hull.append(point)
        steps += [(_slope(a, b), turn, layer) for a, b in pairwise(hull) for turn in range(b[0] - a[0])]
    return cheapest([ks[0] for ks in grids], steps, budget)


def apportion(weights: Sequence[float], experts: Sequence[int], least: int, budget: int) -> list[int]:
    """Spend `budget` experts in proportion to positive weights: layer l gets round(c w_l), at least `least` and at
    most E_l, for the c that spends it all (Webster's method). A layer of more weight never gets fewer, up to its E."""
    layers = enumerate(zip(weights, experts, strict=True))
    steps = [((k + 0.5) / w, k, layer) for layer, (w, e) in layers for k in range(least, e)]
    return cheapest([least] * len(experts), steps, budget)


def cheapest(counts: list[int], steps: Iterable[tuple[float, int, int]], budget: int) -> list[int]:
    """Add the cheapest of the steps (price, turn, layer), one expert each, until `budget` is spent."""
    for _, _, layer in sorted(steps)[: max(budget - sum(counts), 0)]:  # equal layers take turns
        counts[layer] += 1
    return counts


def _slope(a: tuple[int, float], b: tuple[int, float]) -> float:
    return (b[1] - a[1]) / (b[0] - a[0])


# allocations that depend on the layers -> how what was measured of these, which the config keeps, spreads a budget
MEASURED: dict[str, Callable[[Mapping[str, Any], Sequence[int], int, int], list[int]]] = {
    "sensitivity": by_sensitivity,
    "angular": by_angle,
}
ALLOCATIONS = ("uniform", *MEASURED, "global")
