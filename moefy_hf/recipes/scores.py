"""Task metrics by the library `evaluate`, of every model of a run at every budget."""

import json
import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import evaluate
import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import EvalPrediction, PreTrainedModel

from ..errors import MoefyError
from ..measure.metrics import predictions
from .plans import models
from .stages import write_json
from .steps import budgets

if TYPE_CHECKING:
    from .run import Run

BUNDLED = {path.name: path for path in sorted((Path(__file__).parent / "metrics").iterdir()) if path.is_dir()}


class Metrics:
    """Metrics of `evaluate`, by names as `--metrics` has them.

    Args:
        names: ids on the Hub, local modules, or names of `BUNDLED` ones, which are loaded from this package; each may
            have settings: "f1:average=macro".
        sample: predictions that every metric must take, each for itself: a class of every kind, or a text.
        expected: references of the sample, where they are no predictions.

    Raises:
        MoefyError: a metric cannot be loaded, or does not take the sample.
    """

    def __init__(self, names: Sequence[str], sample: Sequence[Any], expected: Sequence[Any] | None = None):
        expected = sample if expected is None else expected
        self.loaded = [(*load(name), name) for name in names]
        for metric, settings, name in self.loaded:
            try:
                metric.compute(predictions=list(sample), references=list(expected), **settings)
            except (ValueError, TypeError, KeyError) as error:
                raise MoefyError(f"--metrics {name}: {error}; settings are given like {name}:average=macro") from None

    def __call__(self, found: Sequence[Any], references: Sequence[Any]) -> dict[str, float]:
        """Return every single number that the metrics make of predictions and references."""
        scores: dict[str, float] = {}
        for metric, settings, _ in self.loaded:
            result = metric.compute(predictions=found, references=references, **settings) or {}
            scores |= {
                name: float(value) for name, value in result.items() if isinstance(value, int | float | np.number)
            }
        return scores

    def of_classes(self, found: EvalPrediction) -> dict[str, float]:
        """Return what a `Trainer` computes from logits and class labels."""
        return self(np.asarray(found.predictions).argmax(-1).tolist(), np.asarray(found.label_ids).tolist())


def load(name: str) -> tuple[Any, Mapping[str, Any]]:
    """Load one metric, and read its settings."""
    place, _, written = name.partition(":")
    settings = dict(pair.split("=", 1) for pair in written.split(",") if "=" in pair)
    if written.count("=") != len(settings) or bool(written) != bool(settings):
        raise MoefyError(f"--metrics {name}: settings are given like f1:average=macro")
    try:
        path = str(BUNDLED.get(place, place))
        return evaluate.load(path, experiment_id=f"moefy-{os.getpid()}"), settings
    except (OSError, ImportError, ValueError) as error:
        raise MoefyError(
            f"--metrics {name} cannot be loaded ({' '.join(str(error).split())}); it is neither an id on the Hub that "
            f"can be reached, nor a local module, nor one of {', '.join(BUNDLED)}, which need no network"
        ) from None


@torch.no_grad()
def classes(run: "Run", model: PreTrainedModel) -> tuple[list[int], list[int]]:
    """Return the most likely class and the label of every held-out row."""
    found: list[int] = []
    labels: list[int] = []
    with run.autocast():
        for batch in tqdm(run.held_out(), desc="score", unit="batch"):
            logits, expected = predictions(model, batch)
            found += logits.argmax(-1).tolist()
            labels += expected.tolist() if expected is not None else []
    return found, labels


def score(run: "Run", name: str, path: Path) -> None:
    """Write the metrics of one model: "NAME at BUDGET" -> metric -> value."""
    if run.predict is None:
        raise MoefyError("this task has no predictions to judge by metrics")
    model = run.load(name).eval()
    found = {f"{name}{budget}": run.metrics(*run.predict(run, model)) for budget in budgets(run, model)}
    write_json(path, found)


def evaluate_models(run: "Run") -> dict[str, dict[str, float]]:
    """Score every model that has a stage for it; return all scores."""
    names = [name for name in models(run.stages.plan) if f"scores_{name}.json" in run.stages.plan]
    for name in names:
        run.stages.run(f"scores_{name}.json", partial(score, run, name))
    found: dict[str, dict[str, float]] = {}
    for name in names:
        found |= json.loads((run.folder / f"scores_{name}.json").read_text())
    return found
