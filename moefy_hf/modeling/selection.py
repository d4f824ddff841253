"""Selections: from router scores to the experts that run, and how one budget is spread over layers."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import torch


class Selection(Protocol):
    """scores (..., E) -> expert ids (..., K) and which of these slots are used (..., K); K is static."""

    def __call__(self, scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]: ...

    def keeps_all(self, num_experts: int) -> bool: ...


@dataclass(frozen=True)
class TopK:
    """The k best experts of each token (MoEfication, section 3.3)."""

    k: int

    def __call__(self, scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        index = scores.topk(self.k, dim=-1, sorted=False).indices
        return index, torch.ones_like(index, dtype=torch.bool)

    def keeps_all(self, num_experts: int) -> bool:
        return self.k >= num_experts


SELECTIONS = {"top_k": TopK}
ALLOCATIONS = ("uniform", "sensitivity")


def count_experts(k: int | float | None, num_experts: int) -> int:
    """An integer k as it is; a float in (0, 1] as a share of the experts, rounded, at least one."""
    if isinstance(k, bool) or not isinstance(k, int | float):
        raise ValueError(f"k must be an integer or a share in (0, 1], got {k!r}")
    if isinstance(k, float):
        if not 0 < k <= 1:
            raise ValueError(f"k={k} is no share of the experts: it must lie in (0, 1] (use an integer for a count)")
        return max(1, round(k * num_experts))
    if not 1 <= k <= num_experts:
        raise ValueError(f"k={k} is out of range: choose 1 to {num_experts} experts, or a share in (0, 1]")
    return k


def resolve_selection(
    selection: dict[str, Any], num_experts: Sequence[int], sensitivity: dict[str, Any] | None = None
) -> list[TopK]:
    """One selection per layer.

    Args:
        selection: `{"type": "top_k", "k": ..., "allocation": "uniform" | "sensitivity"}`; k as in `count_experts`,
            or a list with one k per layer.
        num_experts: E of each layer.
        sensitivity: what `allocate_budgets` measured, needed by allocation "sensitivity".

    Raises:
        ValueError: unknown names (the valid ones are listed), k out of range, or no sensitivity measured yet.
    """
    unknown = set(selection) - {"type", "k", "allocation"}
    if unknown:
        raise ValueError(f"unknown selection settings {sorted(unknown)}; valid: type, k, allocation")
    kind, k, allocation = selection.get("type"), selection.get("k"), selection.get("allocation", "uniform")
    if kind not in SELECTIONS:
        raise ValueError(f"unknown selection {kind!r}; choose from {', '.join(SELECTIONS)}")
    if allocation not in ALLOCATIONS:
        raise ValueError(f"unknown allocation {allocation!r}; choose from {', '.join(ALLOCATIONS)}")
    if isinstance(k, list | tuple):
        if len(k) != len(num_experts):
            raise ValueError(f"k has {len(k)} entries, one per layer is needed: {len(num_experts)}")
        if allocation != "uniform":
            raise ValueError(f"allocation {allocation!r} chooses k for each layer itself: give one k, not a list")
        return [TopK(count_experts(each, experts)) for each, experts in zip(k, num_experts, strict=True)]
    counts = [count_experts(k, experts) for experts in num_experts]
    if allocation == "uniform":
        return [TopK(count) for count in counts]
    if sensitivity is None:
        raise ValueError(
            'allocation "sensitivity" needs measured layers: call moefy_hf.allocate_budgets(model, data) first'
        )
    if len(sensitivity["k"]) != len(num_experts):  # another head: an encoder alone, a decoder alone
        raise ValueError(
            f"sensitivity was measured on {len(sensitivity['k'])} layers, this model has {len(num_experts)}: "
            'use allocation "uniform"'
        )
    return [TopK(count) for count in allocate(sensitivity["k"], sensitivity["loss"], sum(counts))]


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
    counts = [ks[0] for ks in grids]
    for _, _, layer in sorted(steps)[: max(budget - sum(counts), 0)]:  # equal layers take turns
        counts[layer] += 1
    return counts


def _slope(a: tuple[int, float], b: tuple[int, float]) -> float:
    return (b[1] - a[1]) / (b[0] - a[0])
