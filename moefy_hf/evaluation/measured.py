"""What one pass over batches measures of a model at each point of a sweep, in one process or several."""

import functools
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import MoefyError
from ..loading import MoefiedModel
from ..measure.flops import ModelFlops, model_flops
from ..measure.metrics import Quality, predictions
from ..measure.processes import Processes
from ..measure.progress import shared_batches
from .sweep_points import DENSE, SweepPoint


@dataclass(frozen=True)
class Measured:
    """What one pass over the batches measured.

    Attributes:
        flops: of the dense model.
        dense: its quality.
        qualities: of each point.
        counts: for each point, the name of an FFN -> [experts computed, tokens], where that depends on the token.
    """

    flops: ModelFlops
    dense: Quality
    qualities: list[Quality]
    counts: list[dict[str, list[float]]]

    def __add__(self, other: "Measured") -> "Measured":
        """Return what was measured on the batches of both."""
        qualities = [a + b for a, b in zip(self.qualities, other.qualities, strict=True)]
        counts = [
            {key: [x + y for x, y in zip(a.get(key, (0, 0)), b.get(key, (0, 0)), strict=True)] for key in a | b}
            for a, b in zip(self.counts, other.counts, strict=True)
        ]
        return Measured(self.flops, self.dense + other.dense, qualities, counts)


def measure_points(
    model: MoefiedModel,
    batches: Iterable[Mapping[str, Any]],
    points: Sequence[SweepPoint],
    progress: bool,
    processes: Processes,
) -> Measured:
    """Compare a model at each point with its dense self, batch by batch.

    Args:
        processes: that share the batches.

    Raises:
        MoefyError: no position counts in any batch.
    """
    bar = shared_batches(batches, "evaluate", processes, progress)
    parts = [part for part in processes.gathered(lambda: measure_part(model, bar, points)) if part is not None]
    if not parts or not any(part.dense.count for part in parts):
        raise MoefyError("there is nothing to evaluate on: `batches` is empty, or all its labels are -100")
    return functools.reduce(operator.add, parts)


def measure_part(
    model: MoefiedModel, batches: Iterable[Mapping[str, Any]], points: Sequence[SweepPoint]
) -> Measured | None:
    """Compare a model at each point with its dense self on some batches; return None where there are none."""
    dense, qualities = Quality(), [Quality() for _ in points]
    counts: list[dict[str, list[float]]] = [{} for _ in points]
    flops = None
    for batch in batches:
        with DENSE.on(model):
            expected, labels = predictions(model, batch)
            flops = flops or model_flops(model, batch)
        dense.update_(expected, expected, labels)
        for point, quality, count in zip(points, qualities, counts, strict=True):
            with point.on(model), point.counting(model, batch, count):
                quality.update_(predictions(model, batch)[0], expected, labels)
    return Measured(flops, dense, qualities, counts) if flops else None
