"""How the layers share one budget, by what was measured of them."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from .errors import MoefyError

ALPHA = 128 * 1024 / 1e4  # of CFSP: its code takes sums over 128 texts of 1024 tokens, divided by 1e4, and a = 1


def allocate_budget(
    allocation: str, measured: Mapping[str, Any] | None, experts: Sequence[int], least: int, budget: int
) -> list[int]:
    """Return k of each layer: from `least` to its E, `budget` over all.

    Args:
        allocation: one of `MEASURED`.
        measured: what was measured of the layers for it, or None.
        experts: E of each layer.
        least: k of a layer, at least.
        budget: experts to spend over all layers.

    Raises:
        MoefyError: nothing was measured for it, or another number of layers.
    """
    if measured is None:
        raise MoefyError(
            f'allocation "{allocation}" needs measured layers: call '
            f'moefy_hf.allocate_budgets_(model, data, allocation="{allocation}") first'
        )
    layers = len(next(iter(measured.values())))
    if layers != len(experts):  # another head: an encoder alone, a decoder alone
        raise MoefyError(
            f'what allocation "{allocation}" needs was measured on {layers} layers, this model has {len(experts)}: '
            'use allocation "uniform"'
        )
    return MEASURED[allocation](measured, experts, least, budget)


def by_sensitivity(measured: Mapping[str, Any], experts: Sequence[int], least: int, budget: int) -> list[int]:
    """Return more experts for layers whose restriction changes the predictions more; see `allocate`.

    Args:
        measured: "k" and "loss", the grids and losses of `allocate`.
        experts: E of each layer.
        least: k of a layer, at least; here the first of its grid.
        budget: experts to spend over all layers.
    """
    return allocate(measured["k"], measured["loss"], budget)


def by_angle(measured: Mapping[str, Any], experts: Sequence[int], least: int, budget: int) -> list[int]:
    """Return more experts for layers that turn the hidden states further: the coarse part of CFSP.

    The share of its experts that a layer gets is proportional to sigmoid(ALPHA (I - mean of I)). I is its
    importance: the mean angular distance between the hidden states that it is given and returns. Formula and ALPHA
    are those of the authors' code, which computes shares of neurons. Where that would need more than all neurons of a
    layer, it moves all shares towards their mean. Here such a layer gets its E experts, and the others more in
    proportion.
    Source: Wang et al., COLING 2025.

    Args:
        measured: "distance", I of each layer.
        experts: E of each layer.
        least: k of a layer, at least.
        budget: experts to spend over all layers.
    """
    angles = measured["distance"]
    mean = sum(angles) / len(angles)
    weights = [e / (1 + math.exp(ALPHA * (mean - angle))) for e, angle in zip(experts, angles, strict=True)]
    return apportion(weights, experts, least, budget)


def allocate(grids: Sequence[Sequence[int]], losses: Sequence[Sequence[float]], budget: int) -> list[int]:
    """Return k of each layer so that the summed loss is least, each layer's loss being known at a few k.

    Between measured points a layer's loss is taken as the lower convex hull of its points. The next expert always goes
    to the layer where it saves most; on convex curves this greedy choice is optimal.

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
    """Return k of each layer in proportion to positive weights (Webster's method).

    Layer l gets round(c w_l), at least `least` and at most E_l, for the c that spends all of `budget`. A layer of more
    weight never gets fewer, up to its E.

    Args:
        weights: w of each layer, positive.
        experts: E of each layer.
        least: k of a layer, at least.
        budget: experts to spend over all layers.
    """
    layers = enumerate(zip(weights, experts, strict=True))
    steps = [((k + 0.5) / w, k, layer) for layer, (w, e) in layers for k in range(least, e)]
    return cheapest([least] * len(experts), steps, budget)


def cheapest(counts: list[int], steps: Iterable[tuple[float, int, int]], budget: int) -> list[int]:
    """Add the cheapest steps, one expert each, until `budget` is spent; return the counts.

    Args:
        counts: experts that each layer has; changed in place.
        steps: (price, turn, layer) of every expert that can be added.
        budget: experts to spend over all layers, those of `counts` included.
    """
    for _, _, layer in sorted(steps)[: max(budget - sum(counts), 0)]:  # equal layers take turns
        counts[layer] += 1
    return counts


def _slope(a: tuple[int, float], b: tuple[int, float]) -> float:
    return (b[1] - a[1]) / (b[0] - a[0])


# allocation that depends on the layers -> function that shares a budget among them by what was measured of them
MEASURED: dict[str, Callable[[Mapping[str, Any], Sequence[int], int, int], list[int]]] = {
    "sensitivity": by_sensitivity,
    "angular": by_angle,
}
ALLOCATIONS = ("uniform", *MEASURED, "global")
