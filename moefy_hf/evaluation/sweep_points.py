"""What a sweep measures: who routes, and what is selected."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..conversion.thresholds import counted_experts
from ..loading import MoefiedModel
from ..measure.contexts import selecting
from ..modeling.selection import SELECTIONS
from ..modeling.selection_config import check_selection
from .controls import routed_by


@dataclass(frozen=True)
class SweepPoint:
    """One point of a sweep.

    Attributes:
        control: who routes, one of `CONTROLS`; None for the model's own routers.
        selection: what `set_selection` takes, as pairs.
    """

    control: str | None
    selection: tuple[tuple[str, Any], ...]

    @property
    def router(self) -> str:
        """Return what a row of the sweep calls the router."""
        return self.control or "own"

    def counting(
        self, model: MoefiedModel, batch: Mapping[str, Any], counts: dict[str, list[float]]
    ) -> contextlib.AbstractContextManager[None]:
        """Count the experts that are computed, as `counted_experts` does, where that depends on the token."""
        dynamic = SELECTIONS[dict(self.selection)["type"]].dynamic
        return counted_experts(model, batch, counts) if dynamic else contextlib.nullcontext()

    @contextlib.contextmanager
    def on(self, model: MoefiedModel) -> Iterator[None]:
        """Let a model run at this point for a while."""
        with routed_by(model, self.control), selecting(model, **dict(self.selection)):
            yield


DENSE = SweepPoint(None, (("type", "top_k"), ("k", 1.0), ("allocation", "uniform")))


def sweep_points(
    selections: Sequence[str | Mapping[str, Any]],
    controls: Sequence[str],
    allocations: Sequence[str],
    budgets: Sequence[int | float],
) -> list[SweepPoint]:
    """Return the points of a sweep; controls always select "top_k". Whole selections come last.

    Args:
        selections: types, which are swept, and whole selections, each of which is one point.

    Raises:
        MoefyError: a whole selection with unknown names or values.
    """
    whole = [
        {"allocation": "uniform", **selection} if "k" in selection else selection
        for selection in selections
        if isinstance(selection, Mapping)
    ]
    for selection in whole:
        check_selection(selection)
    routings: list[tuple[str | None, str]] = [(None, kind) for kind in selections if isinstance(kind, str)]
    routings += [(control, "top_k") for control in controls]
    points = []
    for allocation in allocations:
        for control, kind in routings:
            applied = "uniform" if (kind, allocation) == ("top_k", "global") else allocation  # top_k has no threshold
            if applied == allocation or applied not in allocations:
                points += [
                    SweepPoint(control, (("type", kind), ("k", budget), ("allocation", applied))) for budget in budgets
                ]
    return [*points, *(SweepPoint(None, tuple(selection.items())) for selection in whole)]
