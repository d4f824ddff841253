"""The `selection` of a config: what it may say, how it is changed, and what each layer selects by it."""

from collections.abc import Mapping, Sequence
from typing import Any

from .budget_allocation import ALLOCATIONS, MEASURED, allocate_budget
from .errors import MoefyError
from .section import Section
from .selection import SELECTIONS, Dynamic, Selection
from .threshold_tables import ThresholdTables


def count_experts(k: int | float | None, num_experts: int, shared: int = 0) -> int:
    """Return k as a number of experts: at least one, and the shared ones.

    Args:
        k: the number itself (int), or a share of the experts (float in (0, 1]), which is rounded.
        num_experts: E, the shared experts included.
        shared: number of experts that always run.

    Raises:
        MoefyError: k is out of range, or neither.
    """
    if isinstance(k, bool) or not isinstance(k, int | float):
        raise MoefyError(f"k must be an integer or a share in (0, 1], got {k!r}")
    if isinstance(k, float):
        if not 0 < k <= 1:
            raise MoefyError(f"k={k} is no share of the experts: it must lie in (0, 1] (use an integer for a count)")
        return max(1, shared, round(k * num_experts))
    if not max(1, shared) <= k <= num_experts:
        counted = f", the {shared} shared ones included" if shared else ""
        raise MoefyError(
            f"k={k} is out of range: choose {max(1, shared)} to {num_experts} experts{counted}, or a share in (0, 1]"
        )
    return k


def changed(selection: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return a selection with some of its keys changed.

    A budget `k` and the threshold of a type ("tau", ...) replace each other. What another type, or one k for each
    layer, cannot use is dropped.

    Args:
        selection: as the config holds it.
        changes: key -> value, as `set_selection` takes them.
    """
    merged = {**selection, **changes}
    names = {cls.name for cls in SELECTIONS.values() if issubclass(cls, Dynamic)}
    threshold = setting_name(merged.get("type"))
    dropped = names - {threshold} - set(changes)
    if threshold in changes and "k" not in changes:
        dropped |= {"k", "allocation"} - set(changes)
    elif "k" in changes:
        dropped |= names - set(changes)
    if isinstance(changes.get("k"), list | tuple) and "allocation" not in changes:
        merged["allocation"] = "uniform"
    if merged.get("type") == "top_k" and merged.get("allocation") == "global" and "allocation" not in changes:
        dropped.add("allocation")
    return {key: value for key, value in merged.items() if key not in dropped}


def setting_name(kind: Any) -> str | None:
    """Return what the threshold of a dynamic selection is called; None for other selections.

    Args:
        kind: one of `SELECTIONS`.
    """
    cls = SELECTIONS.get(kind) if isinstance(kind, str) else None
    return cls.name if cls is not None and issubclass(cls, Dynamic) else None


def check_selection(selection: Mapping[str, Any]) -> None:
    """Check what a selection says, without a model.

    Args:
        selection: as the config holds it.

    Raises:
        MoefyError: unknown names (the valid ones are listed), or keys that exclude each other.
    """
    kind, allocation = selection.get("type"), selection.get("allocation", "uniform")
    if not isinstance(kind, str) or kind not in SELECTIONS:
        raise MoefyError(f"unknown selection {kind!r}; choose from {', '.join(SELECTIONS)}")
    name = setting_name(kind)
    valid = ["type", "k", "allocation", *([name] if name else [])]
    unknown = set(selection) - set(valid)
    if unknown:
        raise MoefyError(f"unknown selection settings {sorted(unknown)}; valid: {', '.join(valid)}")
    if not isinstance(allocation, str) or allocation not in ALLOCATIONS:
        raise MoefyError(f"unknown allocation {allocation!r}; choose from {', '.join(ALLOCATIONS)}")
    if name and (name in selection) == ("k" in selection):
        raise MoefyError(f"selection {kind!r} takes either {name} or a budget k, got {dict(selection)}")
    if name in selection and allocation != "uniform":
        raise MoefyError(f"{name} says what each layer selects: leave out the allocation {allocation!r}")
    if allocation == "global" and not name:
        raise MoefyError(f"allocation 'global' is one setting for all layers, and {kind!r} has none but k: 'uniform'")
    if isinstance(selection.get("k"), list | tuple) and allocation != "uniform":
        raise MoefyError(f"allocation {allocation!r} chooses k for each layer itself: give one k, not a list")


def resolve_selection(
    selection: Mapping[str, Any],
    num_experts: Sequence[int],
    section: Section | Mapping[str, Any] | None = None,
    shared: int = 0,
) -> list[Selection]:
    """Return one selection per layer.

    Args:
        selection: `{"type": ..., "k": ..., "allocation": ...}`: k as in `count_experts`, or a list with one k per
            layer; or, for a dynamic type, its threshold, one or a list: `{"type": "threshold", "tau": 0.9}`.
        num_experts: E of each layer.
        section: of a config, or a mapping of what it holds of measurements: those of layers, which allocations of
            `MEASURED` need, and those of routers, which dynamic types with a budget need.
        shared: how many of each layer's experts always run; k counts them.

    Raises:
        MoefyError: see `check_selection`; k out of range, or what is needed has not been measured yet.
    """
    check_selection(selection)
    kind, cls, routed = selection["type"], SELECTIONS[selection["type"]], [e - shared for e in num_experts]
    section = section if isinstance(section, Section) else Section.of_values(section or {})
    known_thresholds = section.thresholds
    if issubclass(cls, Dynamic) and cls.name in selection:
        thresholds = [cls.checked(value) for value in per_layer(cls.name, selection[cls.name], len(num_experts))]
        known: Sequence[float | None] = [None] * len(thresholds)  # also where another head was measured
        if len(known_thresholds.get(kind, ())) == len(thresholds):
            known = ThresholdTables(kind, routed, known_thresholds).computed(thresholds)
        return [cls(threshold, k) for threshold, k in zip(thresholds, known, strict=True)]
    ks = per_layer("k", selection.get("k"), len(num_experts))
    counts = [count_experts(k, experts, shared) for k, experts in zip(ks, num_experts, strict=True)]
    allocation = selection.get("allocation", "uniform")
    if allocation in MEASURED:
        counts = allocate_budget(allocation, section.measured(allocation), num_experts, max(1, shared), sum(counts))
    budgets: Sequence[float] = [count - shared for count in counts]
    if not issubclass(cls, Dynamic):
        return [cls(int(k)) for k in budgets]
    if kind not in known_thresholds:
        raise MoefyError(
            f"selection {kind!r} with a budget k needs a measured router: call "
            f"moefy_hf.calibrate_thresholds_(model, data) first, or give {cls.name}"
        )
    tables = ThresholdTables(kind, routed, known_thresholds)
    if allocation == "global" and list(budgets) != routed:
        budgets = tables.computed([tables.common_threshold(sum(budgets))] * len(budgets))
    return [cls(threshold, k) for threshold, k in tables.thresholds(budgets)]


def per_layer(name: str, value: Any, layers: int) -> list:
    """Return a list with one value for each layer.

    Args:
        name: of the value, for the error's message.
        value: one for all layers, or such a list.
        layers: number of layers.

    Raises:
        MoefyError: a list of another length.
    """
    if not isinstance(value, list | tuple):
        return [value] * layers
    if len(value) != layers:
        raise MoefyError(f"{name} has {len(value)} entries, one per layer is needed: {layers}")
    return list(value)
