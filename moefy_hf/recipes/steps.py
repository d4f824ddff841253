"""Steps of a run around a converted model: convert, compare budgets, set budgets, save."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel

from ..conversion.checks import check_convertible
from ..conversion.convert import moefy_
from ..conversion.thresholds import calibrate_thresholds_
from ..evaluation.quality_check import check_quality
from ..evaluation.sweep import Sweep, evaluate
from ..hub.card import PLOT
from ..loading import check_moefied
from ..modeling.moefied import is_moefied
from ..modeling.section import Section
from .arguments import ControlArguments
from .publishing import describe_conversion, describe_quality
from .settings import allocation_of, checking

if TYPE_CHECKING:
    from .run import Run


def convert(run: "Run") -> Path:
    """Convert the dense model of a run, one process' work; return where the MoEfied one is."""
    return run.stages.run("moefied", lambda path: _convert(run, path))


def _convert(run: "Run", path: Path) -> None:
    model = run.load("dense")
    with checking():
        check_convertible(model, run.config, run.splits["train"])
    report = moefy_(model, run.config, run.calibration())
    with run.autocast():
        prediction = check_quality(model, run.validation())
    save(model, run.processor, path)
    describe_conversion(run, path, report, prediction)
    print(f"{report.table()}\n\npredicted: {prediction.line()}\n{prediction.message()}", flush=True)


def compare_budgets(run: "Run", name: str, path: Path) -> None:
    """Write the sweep of a MoEfied model over held-out data, under autocast where training was.

    Controls stand beside the model as it was converted, a selection that was learned beside the budgets.
    """
    controls = run.arguments[ControlArguments].controls if name == "moefied" else []
    model = run.load(name)
    own = Section(model.config).selection
    with run.autocast():
        kinds = run.evaluation.selections
        calibrate_thresholds_(model, run.calibration(), [kind for kind in kinds if kind != "top_k"])
        found = evaluate(
            model,
            run.held_out(),
            run.evaluation.budgets,
            controls=controls,
            selections=kinds if "k" in own else [*kinds, own],
            allocations=compared(run),
            calibration=run.calibration(),
        )
    describe_quality(run, run.folder / name, found)
    found.save(path)


def compared(run: "Run") -> list[str]:
    """Return the allocations that a sweep compares: the model's own, beside uniform budgets."""
    return list(dict.fromkeys(["uniform", allocation_of(run.config)]))


def budgets(run: "Run", model: PreTrainedModel) -> Iterator[str]:
    """Set what a model is read at, one after the other, and say what it is called.

    That is the selection it has learned, and shares of the experts; nothing where it is dense.
    """
    if not is_moefied(model):
        yield ""
        return
    model = check_moefied(model)
    changes: dict[str, Any] = {}
    if "k" not in Section(model.config).selection:
        yield " as learned"
        changes = {"type": "top_k", "allocation": allocation_of(run.config)}
    for budget in run.evaluation.budgets:
        model.set_selection(k=budget, **changes)
        yield f" at {budget}"


def save(model: PreTrainedModel, processor: Any, path: Path) -> None:
    """Save a model with its tokenizer or image processor."""
    model.save_pretrained(path)
    processor.save_pretrained(path)


def show_sweep(directory: Path) -> None:
    """Print the sweep of the converted model, and put the picture of it that the model's card has beside it."""
    print(Sweep.load(directory / "sweep.json").table())
    drawn = directory / "moefied" / PLOT
    if drawn.exists():
        shutil.copyfile(drawn, directory / "sweep.png")
    else:
        print("no plot: plots need matplotlib: pip install 'moefy-hf[plots]'")
