"""The stages of a recipe: train dense, convert, sweep, recover; or MoEfy while training."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from publishing import describe_conversion, describe_quality, describe_training, publish
from recovery import check_schedule, finished_model, following, penalties, prepare, recovering, recovery_arguments
from recovery_facts import facts_of
from run import Run, models_of, swept
from stages import write_json
from sweep_tables import tables
from transformers import PreTrainedModel, TrainerCallback, TrainingArguments, set_seed

from moefy_hf import MoEficationCallback, Sweep, calibrate_thresholds_, evaluate, moefy_, profile, relufy_
from moefy_hf.conversion.budgets import allocate_budgets_
from moefy_hf.conversion.checks import check_convertible
from moefy_hf.conversion.thresholds import TOKENS
from moefy_hf.evaluation.quality_check import check_quality
from moefy_hf.measure.metrics import Quality, predictions
from moefy_hf.modeling.budget_allocation import MEASURED
from moefy_hf.modeling.moefied import is_moefied


def classify(run: Run, make: Callable[[], PreTrainedModel], activation: str | None) -> None:
    """All stages; `make` gives the model to fine-tune."""
    check_schedule(run.moe_args, run.training_args, len(run.splits["train"]))
    dense = train_dense(run, make, activation)
    if run.training_args.should_save:  # conversion and evaluation are one process' work
        moefied = run.stages.run("moefied", lambda path: convert(run, dense, path))
        run.stages.run("sweep.json", lambda path: sweep(run, moefied, path, run.moe_args.controls))
        show(run.stages.directory)
    if run.moe_args.recovery_epochs:
        run.training_args.distributed_state.wait_for_everyone()
        recover(run, dense, run.stages.directory / "moefied")
    if run.moe_args.schedule:
        run.training_args.distributed_state.wait_for_everyone()
        train_scheduled(run, make, activation, dense)
    if run.training_args.should_save and (run.moe_args.recovery_epochs or run.moe_args.schedule):
        print(tables(facts_of([run.stages.directory], models_of(run.moe_args)), ["relative_quality"]))
    if run.training_args.should_save:
        publish(run)


def train_dense(run: Run, make: Callable[[], PreTrainedModel], activation: str | None) -> Path:
    """Fine-tune the dense model, with another activation and a sparsity penalty where asked for."""
    make = partial(checked, run, make, activation)
    return train(run, "dense", run.training_args, make, partial(penalties, run.moe_args))


def checked(run: Run, make: Callable[[], PreTrainedModel], activation: str | None) -> PreTrainedModel:
    """A model that can be converted, which is found out before it is trained."""
    model = make()
    check_convertible(model, run.config, run.splits["train"])
    return relufy_(model, activation) if activation else model


def train_scheduled(run: Run, make: Callable[[], PreTrainedModel], activation: str | None, dense: Path) -> None:
    """The whole flow in one training: the callback profiles, splits, routes and anneals."""

    def callbacks() -> list[TrainerCallback]:
        callback = MoEficationCallback(run.config, schedule=run.moe_args.schedule or "anneal")
        return following(callback, run.auto, run.moe_args, dense)

    scheduled = train(run, "scheduled", run.training_args, partial(checked, run, make, activation), callbacks)
    if run.training_args.should_save:
        run.stages.run("scheduled.json", lambda path: sweep(run, scheduled, path))


def train(
    run: Run,
    name: str,
    training_args: TrainingArguments,
    make: Callable[[], PreTrainedModel],
    callbacks: Callable[[], list[TrainerCallback]],
) -> Path:
    """One stage that trains a model and leaves it in a folder; all processes take part."""
    if run.stages.finished(name):
        return run.stages.directory / name
    set_seed(training_args.seed)
    trainer = run.trainer(
        make(),
        training_args,
        train_dataset=run.splits["train"],
        eval_dataset=run.splits["validation"],
        processing_class=run.processor,
        data_collator=run.collator,
        compute_metrics=run.metrics,
        callbacks=callbacks(),
    )
    trainer.train()
    if training_args.should_save:
        run.stages.run(name, lambda path: save_trained(run, finished_model(trainer.model), path, name))
    training_args.distributed_state.wait_for_everyone()
    return run.stages.directory / name


def convert(run: Run, dense: Path, path: Path) -> None:
    model = run.load(dense)
    report = moefy_(model, run.config, run.calibration())
    with run.autocast():
        prediction = check_quality(model, run.batches(run.splits["validation"], True, 0))
    save(model, run.processor, path)
    describe_conversion(run, path, report, prediction)
    print(f"{report.table()}\n\npredicted: {prediction.line()}\n{prediction.message()}", flush=True)


def sweep(run: Run, moefied: Path, path: Path, controls: Sequence[str] = ()) -> None:
    """Validation and test together, under autocast where training was; a selection that was learned, too."""
    model = run.load(moefied, trust_remote_code=True)
    own = model.config.moefication["selection"]
    with run.autocast():
        kinds = run.moe_args.selections
        calibrate_thresholds_(model, run.calibration(), [kind for kind in kinds if kind != "top_k"])
        kinds = kinds if "k" in own else [*kinds, own]
        settings = {"controls": controls, "selections": kinds, "allocations": swept(run.moe_args)}
        settings["calibration"] = run.calibration()
        found = evaluate(model, run.held_out(), run.moe_args.shares, **settings)
    describe_quality(run, moefied, found)
    found.save(path)


def recover(run: Run, dense: Path, moefied: Path) -> None:
    """Fine-tune the converted model at its budget, or until it has learned one, and the dense one for as many steps
    beside it."""
    moe_args, training_args = run.moe_args, recovery_arguments(run.training_args, run.moe_args)

    def converted() -> PreTrainedModel:
        return prepare(run.auto.from_pretrained(moefied, trust_remote_code=True), moe_args, run.task_type)

    def control() -> PreTrainedModel:
        return prepare(run.auto.from_pretrained(dense), moe_args, run.task_type)

    def callbacks() -> list[TrainerCallback]:
        return following(recovering(moe_args), run.auto, moe_args, dense)

    recovered = train(run, "recovered", training_args, converted, callbacks)
    trained_on = train(run, "control", training_args, control, partial(penalties, moe_args))
    if not training_args.should_save:
        return
    run.stages.run("recovered.json", lambda path: sweep(run, recovered, path))
    run.stages.run("control.json", lambda path: write_json(path, {"accuracy": accuracy(run, trained_on)}))


@torch.no_grad()
def accuracy(run: Run, folder: Path) -> float:
    """Of a dense model, on validation and test together."""
    model, quality = run.load(folder).eval(), Quality()
    with run.autocast():
        for batch in run.held_out():
            logits, labels = predictions(model, batch)
            quality.update_(logits, logits, labels)
    return quality.figures()["accuracy"]


def save_trained(run: Run, model: PreTrainedModel, path: Path, name: str) -> None:
    if is_moefied(model) and "k" not in model.config.moefication["selection"]:
        measure_again(run, model)
    save(model, run.processor, path)
    if is_moefied(model):
        describe_training(run, path, name)


def measure_again(run: Run, model: PreTrainedModel) -> None:
    """What budgets need and training the routers has made void; the model keeps the selection it has learned."""
    section, allocation = model.config.moefication, run.moe_args.allocation
    learned = dict(section["selection"])
    with profile(model, run.calibration(), max_tokens=TOKENS, layers=section["layers"]) as found:
        calibrate_thresholds_(model, found, [learned["type"]])
        if allocation in MEASURED:
            allocate_budgets_(model, found.batches, run.moe_args.share, allocation)
    model.set_selection(**learned)


def budgets(run: Run, model: PreTrainedModel) -> Iterator[str]:
    """Set what a model is read at, one after the other, and say what it is called: the selection it has learned, and
    shares of the experts; nothing where it is dense."""
    if not is_moefied(model):
        yield ""
        return
    changes: dict[str, Any] = {}
    if "k" not in model.config.moefication["selection"]:
        yield " as learned"
        changes = {"type": "top_k", "allocation": run.moe_args.allocation}
    for share in run.moe_args.shares:
        model.set_selection(k=share, **changes)
        yield f" at {share}"


def save(model: PreTrainedModel, processor: Any, path: Path) -> None:
    model.save_pretrained(path)
    processor.save_pretrained(path)


def show(directory: Path) -> None:
    found = Sweep.load(directory / "sweep.json")
    print(found.table())
    for what, name in (("dense model", "dense"), ("MoEfied model", "moefied")):
        print(f"{what}: {directory / name}")
    try:
        found.plot(directory / "sweep.png")
        print(f"plot: {directory / 'sweep.png'}")
    except ImportError as error:
        print(f"no plot: {error}")
