"""How one budget is spread over layers: from the `selection` of a config to one selection per layer."""

import math
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from .section import Section
from .selection import SELECTIONS, Dynamic, Selection

ALPHA = 128 * 1024 / 1e4  # of CFSP: its code takes sums over 128 texts of 1024 tokens, divided by 1e4, and a = 1


def count_experts(k: int | float | None, num_experts: int, shared: int = 0) -> int:
    """An integer k as it is; a float in (0, 1] as a share of the experts, rounded; at least one, and the shared."""
    if isinstance(k, bool) or not isinstance(k, int | float):
        raise ValueError(f"k must be an integer or a share in (0, 1], got {k!r}")
    if isinstance(k, float):
        if not 0 < k <= 1:
            raise ValueError(f"k={k} is no share of the experts: it must lie in (0, 1] (use an integer for a count)")
        return max(1, shared, round(k * num_experts))
    if not max(1, shared) <= k <= num_experts:
        counted = f", the {shared} shared ones included" if shared else ""
        raise ValueError(
            f"k={k} is out of range: choose {max(1, shared)} to {num_experts} experts{counted}, or a share in (0, 1]"
        )
    return k


def changed(selection: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A selection with some settings changed: a budget `k` and the setting of a type ("tau", ...) replace each other,
    and another type, or k for each layer, keeps nothing that it cannot use."""
    found = {**selection, **changes}
    names = {cls.name for cls in SELECTIONS.values() if issubclass(cls, Dynamic)}
    own = setting_name(found.get("type"))
    dropped = names - {own} - set(changes)
    if own in changes and "k" not in changes:
        dropped |= {"k", "allocation"} - set(changes)
    elif "k" in changes:
        dropped |= names - set(changes)
    if isinstance(changes.get("k"), list | tuple) and "allocation" not in changes:
        found["allocation"] = "uniform"
    if found.get("type") == "top_k" and found.get("allocation") == "global" and "allocation" not in changes:
        dropped.add("allocation")
    return {key: value for key, value in found.items() if key not in dropped}


def setting_name(kind: Any) -> str | None:
    """What the setting of a dynamic selection is called."""
    cls = SELECTIONS.get(kind) if isinstance(kind, str) else None
    return cls.name if cls is not None and issubclass(cls, Dynamic) else None


def check_selection(selection: Mapping[str, Any]) -> None:
    """
    Raises:
        ValueError: unknown names (the valid ones are listed), a setting out of range, or two settings for one thing.
    """
    kind, allocation = selection.get("type"), selection.get("allocation", "uniform")
    if not isinstance(kind, str) or kind not in SELECTIONS:
        raise ValueError(f"unknown selection {kind!r}; choose from {', '.join(SELECTIONS)}")
    own = setting_name(kind)
    valid = ["type", "k", "allocation", *([own] if own else [])]
    unknown = set(selection) - set(valid)
    if unknown:
        raise ValueError(f"unknown selection settings {sorted(unknown)}; valid: {', '.join(valid)}")
    if not isinstance(allocation, str) or allocation not in ALLOCATIONS:
        raise ValueError(f"unknown allocation {allocation!r}; choose from {', '.join(ALLOCATIONS)}")
    if own and (own in selection) == ("k" in selection):
        raise ValueError(f"selection {kind!r} takes either {own} or a budget k, got {dict(selection)}")
    if own in selection and allocation != "uniform":
        raise ValueError(f"{own} says what each layer selects: leave out the allocation {allocation!r}")
    if allocation == "global" and not own:
        raise ValueError(f"allocation 'global' is one setting for all layers, and {kind!r} has none but k: 'uniform'")
    if isinstance(selection.get("k"), list | tuple) and allocation != "uniform":
        raise ValueError(f"allocation {allocation!r} chooses k for each layer itself: give one k, not a list")


def resolve_selection(
    selection: Mapping[str, Any],
    num_experts: Sequence[int],
    section: Section | Mapping[str, Any] | None = None,
    shared: int = 0,
) -> list[Selection]:
    """One selection per layer.

    Args:
        selection: `{"type": ..., "k": ..., "allocation": ...}`: k as in `count_experts`, or a list with one k per
            layer; or, for a dynamic type, its setting, one or a list: `{"type": "threshold", "tau": 0.9}`.
        num_experts: E of each layer.
        section: of a config, or a mapping of what it holds of measurements: those of layers, which allocations of
            `MEASURED` need, and those of routers, which dynamic types with a budget need.
        shared: how many of each layer's experts always run; k counts them.

    Raises:
        ValueError: see `check_selection`; k out of range, or what is needed has not been measured yet.
    """
    check_selection(selection)
    kind, cls, routed = selection["type"], SELECTIONS[selection["type"]], [e - shared for e in num_experts]
    section = section if isinstance(section, Section) else Section.of_values(section or {})
    reach = section.thresholds
    if issubclass(cls, Dynamic) and cls.name in selection:
        settings = [cls.checked(each) for each in per_layer(cls.name, selection[cls.name], len(num_experts))]
        known: Sequence[float | None] = [None] * len(settings)  # also where another head was measured
        if len(reach.get(kind, ())) == len(settings):
            known = Reach(kind, routed, reach).spent(settings)
        return [cls(each, k) for each, k in zip(settings, known, strict=True)]
    ks = per_layer("k", selection.get("k"), len(num_experts))
    counts = [count_experts(k, experts, shared) for k, experts in zip(ks, num_experts, strict=True)]
    allocation = selection.get("allocation", "uniform")
    if allocation in MEASURED:
        counts = spread(allocation, section.measured(allocation), num_experts, max(1, shared), sum(counts))
    budgets: Sequence[float] = [count - shared for count in counts]
    if not issubclass(cls, Dynamic):
        return [cls(int(k)) for k in budgets]
    if kind not in reach:
        raise ValueError(
            f"selection {kind!r} with a budget k needs a measured router: call "
            f"moefy_hf.measure_reach(model, data) first, or give {cls.name}"
        )
    tables = Reach(kind, routed, reach)
    if allocation == "global" and list(budgets) != routed:
        budgets = tables.spent([tables.setting_of(sum(budgets))] * len(budgets))
    return [cls(setting, k) for setting, k in tables.settings(budgets)]


class Reach:
    """What `measure_reach` found for one type of selection: in each layer, the setting that computes each share of the
    routed experts.

    Raises:
        ValueError: it was measured on another number of layers.
    """

    def __init__(self, kind: str, experts: Sequence[int], measured: Mapping[str, Any]):
        self.experts, self.shares, self.tables = experts, measured["share"], measured[kind]
        if len(self.tables) != len(experts):  # another head: an encoder alone, a decoder alone
            raise ValueError(
                f"{kind!r} was measured on {len(self.tables)} layers, this model has {len(experts)}: "
                "call moefy_hf.measure_reach(model, data)"
            )

    def settings(self, budgets: Sequence[float]) -> list[tuple[float, float]]:
        """For each layer's average number of experts, its setting and what that spends: less, where so many experts
        need the very same setting (those of strength 0) that it would compute many more."""
        found = []
        for k, experts, table in zip(budgets, self.experts, self.tables, strict=True):
            setting = interpolated(k / experts, self.shares, table)
            if interpolated(setting, table, self.shares) > k / experts + self.shares[1]:
                setting = just_below(setting)
                k = interpolated(setting, table, self.shares) * experts
            found.append((setting, k))
        return found

    def spent(self, settings: Sequence[float]) -> list[float]:
        """For each layer's setting, its average number of experts."""
        layers = zip(settings, self.experts, self.tables, strict=True)
        return [interpolated(setting, table, self.shares) * experts for setting, experts, table in layers]

    def setting_of(self, budget: float) -> float:
        """The one setting that spends `budget` experts over all layers; less, as in `settings`."""
        low, high = min(table[0] for table in self.tables), max(table[-1] for table in self.tables)
        for _ in range(60):
            middle = (low + high) / 2
            less = sum(self.spent([middle] * len(self.tables))) < budget
            low, high = (middle, high) if less else (low, middle)
        much = sum(self.spent([high] * len(self.tables))) > budget + self.shares[1] * sum(self.experts)
        return just_below(high) if much else high


def just_below(setting: float) -> float:
    """Less than a setting, also where a table's rounding raised it."""
    return setting - 1e-4 * max(1.0, abs(setting))


def per_layer(name: str, value: Any, layers: int) -> list:
    """One for all, or a list with one for each."""
    if not isinstance(value, list | tuple):
        return [value] * layers
    if len(value) != layers:
        raise ValueError(f"{name} has {len(value)} entries, one per layer is needed: {layers}")
    return list(value)


def spread(
    allocation: str, measured: Mapping[str, Any] | None, experts: Sequence[int], least: int, budget: int
) -> list[int]:
    """k of each layer, from `least` to its E, `budget` over all of them, by what was measured for an allocation."""
    if measured is None:
        raise ValueError(
            f'allocation "{allocation}" needs measured layers: call '
            f'moefy_hf.allocate_budgets(model, data, allocation="{allocation}") first'
        )
    layers = len(next(iter(measured.values())))
    if layers != len(experts):  # another head: an encoder alone, a decoder alone
        raise ValueError(
            f'what allocation "{allocation}" needs was measured on {layers} layers, this model has {len(experts)}: '
            'use allocation "uniform"'
        )
    return MEASURED[allocation](measured, experts, least, budget)


def by_sensitivity(measured: Mapping[str, Any], experts: Sequence[int], least: int, budget: int) -> list[int]:
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


def interpolated(x: float, xs: Sequence[float], ys: Sequence[float]) -> float:
    """The piecewise linear function through (xs, ys), xs not decreasing; constant outside."""
    right = bisect_right(xs, x)
    if right == 0:
        return ys[0]
    if right == len(xs):
        return ys[-1]
    (x0, x1), (y0, y1) = xs[right - 1 : right + 1], ys[right - 1 : right + 1]
    return y0 + (y1 - y0) * (x - x0) / (x1 - x0)


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
