"""Trainings of a run: the dense model, recovery after conversion with its control, and conversion while training."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedModel, TrainerCallback, TrainingArguments, set_seed

from ..conversion.budgets import allocate_budgets_
from ..conversion.checks import check_convertible
from ..conversion.thresholds import TOKENS, calibrate_thresholds_
from ..errors import MoefyError
from ..loading import MoefiedModel, check_moefied
from ..measure.metrics import Quality, predictions
from ..measure.profile import profile
from ..modeling.budget_allocation import MEASURED
from ..modeling.moefied import is_moefied
from ..modeling.section import Section
from ..training.callback import MoEficationCallback
from ..training.sparsity import relufy_
from .arguments import LearnedArguments, RecoveryArguments, ScheduleArguments, SparsityArguments
from .publishing import describe_training
from .recovery import check_schedule, merged, penalties, prepare, recovering, recovery_arguments, teaching
from .settings import allocation_of, checking
from .stages import write_json
from .steps import compare_budgets, save

if TYPE_CHECKING:
    from .run import Run

Make = Callable[[], PreTrainedModel]


def fine_tune(run: "Run", make: Make) -> Path:
    """Train the dense model that `make` gives, with another activation and a sparsity penalty where asked for."""
    return train(
        run, "dense", run.training, lambda: checked(run, make), lambda: penalties(run.arguments[SparsityArguments])
    )


def checked(run: "Run", make: Make) -> PreTrainedModel:
    """Make a model and see that it can be converted, before it is trained."""
    with checking():
        if ScheduleArguments in run.arguments:
            check_schedule(run.arguments[ScheduleArguments].schedule, run.training, len(run.splits["train"]))
        model, settings = make(), run.arguments.model
        check_convertible(model, run.config, run.splits["train"])
        if settings.activation:
            relufy_(model, settings.activation)
        freeze(model, getattr(settings, "frozen", []))
    return model


def freeze(model: PreTrainedModel, patterns: list[str]) -> None:
    """Leave parameters out of the training by parts of their names.

    Raises:
        MoefyError: a part is in no name.
    """
    for pattern in patterns:
        chosen = [parameter for name, parameter in model.named_parameters() if pattern in name]
        if not chosen:
            raise MoefyError(f"frozen: no parameter of {type(model).__name__} has {pattern!r} in its name")
        for parameter in chosen:
            parameter.requires_grad_(False)


def train(
    run: "Run",
    name: str,
    training: TrainingArguments,
    make: Make,
    callbacks: Callable[[], list[TrainerCallback]],
) -> Path:
    """Train a model as one stage, and leave it in a folder; all processes take part."""
    if run.stages.finished(name):
        return run.folder / name
    set_seed(training.seed)
    trainer = run.trainer(
        make(),
        training,
        train_dataset=run.splits["train"],
        eval_dataset=run.splits["validation"],
        processing_class=run.processor,
        data_collator=run.collator,
        compute_metrics=run.compute_metrics,
        callbacks=callbacks(),
    )
    trainer.train()
    if run.writes:
        run.stages.run(name, lambda path: save_trained(run, merged(trainer.model), path, name))
    run.wait()
    return run.folder / name


def recover(run: "Run") -> None:
    """Fine-tune the converted model, and as planned the dense one for as many steps beside it; compare budgets again.

    It is fine-tuned at its budget, or until it has learned one.
    """
    arguments, plan = run.arguments, run.stages.plan
    recovery, learned = arguments[RecoveryArguments], arguments[LearnedArguments]
    run.wait()

    def begun(name: str) -> PreTrainedModel:
        return prepare(run.fetch(name), recovery, learned, run.task_type)

    def callbacks() -> list[TrainerCallback]:
        return [recovering(learned), *teaching(run)]

    training = recovery_arguments(arguments)
    train(run, "recovered", training, lambda: begun("moefied"), callbacks)
    if "control" in plan:
        train(run, "control", training, lambda: begun("dense"), lambda: penalties(arguments[SparsityArguments]))
    if run.writes:
        run.stages.run("recovered.json", lambda path: compare_budgets(run, "recovered", path))
    if run.writes and "control" in plan:
        run.stages.run("control.json", lambda path: write_json(path, {"accuracy": accuracy(run, "control")}))


def train_scheduled(run: "Run", make: Make) -> None:
    """Train from what the dense model began with, while a callback profiles, splits, routes and anneals."""
    schedule = run.arguments[ScheduleArguments].schedule or "anneal"
    run.wait()

    def callbacks() -> list[TrainerCallback]:
        callback = MoEficationCallback(run.config, schedule=schedule)
        return [callback, *teaching(run)]

    train(run, "scheduled", run.training, lambda: checked(run, make), callbacks)
    if run.writes:
        run.stages.run("scheduled.json", lambda path: compare_budgets(run, "scheduled", path))


@torch.no_grad()
def accuracy(run: "Run", name: str) -> float:
    """Return the accuracy of a dense model's predictions on validation and test together."""
    model, quality = run.load(name).eval(), Quality()
    with run.autocast():
        for batch in run.held_out():
            logits, labels = predictions(model, batch)
            quality.update_(logits, logits, labels)
    return quality.figures()["accuracy"]


def save_trained(run: "Run", model: PreTrainedModel, path: Path, name: str) -> None:
    """Save a trained model; a MoEfied one with what is known of it."""
    if is_moefied(model) and "k" not in Section(model.config).selection:
        measure_again(run, check_moefied(model))
    save(model, run.processor, path)
    if is_moefied(model):
        describe_training(run, path, name)


def measure_again(run: "Run", model: MoefiedModel) -> None:
    """Measure what budgets need and training the routers has made void; a learned selection is kept."""
    section, allocation = model.config.moefication, allocation_of(run.config)
    learned = dict(section["selection"])
    with profile(model, run.calibration(), max_tokens=TOKENS, layers=section["layers"]) as measured:
        calibrate_thresholds_(model, measured, [learned["type"]])
        if allocation in MEASURED:
            k = run.config.k
            allocate_budgets_(model, measured.batches, k if not isinstance(k, list) else sum(k) / len(k), allocation)
    model.set_selection(**learned)
