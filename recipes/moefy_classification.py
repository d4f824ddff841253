"""Fine-tune an encoder on labelled text, MoEfy it, and measure quality against compute.

    accelerate launch recipes/moefy_classification.py --config recipes/configs/minilm_movie/moefication.yaml

Stages, each skipped when its result is there: dense/ (the fine-tuned dense model), moefied/ (the converted model),
sweep.json and sweep.png (quality at several budgets). With --recovery_epochs also recovered/ (the converted model,
fine-tuned at its budget), control/ (the dense one, trained for as many steps) and their figures. Any setting of the
YAML file can be given on the command line:

    ... --model_name_or_path google-bert/bert-base-uncased --dataset_name stanfordnlp/sst2 --text_column sentence \\
        --test_split validation --share 0.3 --recovery_epochs 1 --distillation_weight 1
"""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import real_inputs
import torch
from common import (
    Batches,
    DataArguments,
    ModelArguments,
    MoeficationArguments,
    parse,
    write_json,
)
from recovery import (
    finished_model,
    penalties,
    prepare,
    recovery_arguments,
    recovery_callbacks,
    summary,
)
from run import Run, begin
from transformers import (
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from moefy_hf import Sweep, evaluate, moefy_, relufy_
from moefy_hf.conversion import check_convertible
from moefy_hf.quality import Quality, predictions


def main() -> None:
    model_args, data_args, moe_args, training_args = parse(
        (ModelArguments, DataArguments, MoeficationArguments, TrainingArguments), __doc__
    )
    run = begin(model_args, data_args, moe_args, training_args)
    dense = train_dense(run)
    if training_args.should_save:  # conversion and evaluation are one process' work
        moefied = run.stages.run("moefied", lambda path: convert(run, dense, path))
        run.stages.run("sweep.json", lambda path: sweep(run, moefied, path))
        show(run.stages.directory)
    if moe_args.recovery_epochs:
        training_args.distributed_state.wait_for_everyone()
        recover(run, dense, run.stages.directory / "moefied")


def train_dense(run: Run) -> Path:
    """Fine-tune the dense model, with another activation and a sparsity penalty where asked for."""
    args, activation = run.model_args, run.model_args.activation

    def make() -> PreTrainedModel:
        model = AutoModelForSequenceClassification.from_pretrained(
            real_inputs.resolve(args.model_name_or_path),
            revision=args.model_revision,
            dtype=args.dtype,
            attn_implementation=args.attn_implementation,
            trust_remote_code=args.trust_remote_code,
            num_labels=len(run.names),
            id2label=dict(enumerate(run.names)),
            label2id={name: position for position, name in enumerate(run.names)},
        )
        check_convertible(model, run.config, run.splits["train"])  # before training it
        return relufy_(model, activation) if activation else model

    return train(run, "dense", run.training_args, make, penalties(run.moe_args))


def train(
    run: Run,
    name: str,
    training_args: TrainingArguments,
    make: Callable[[], PreTrainedModel],
    callbacks: list[TrainerCallback],
) -> Path:
    """One stage that trains a model and leaves it in a folder; all processes take part."""
    if run.stages.finished(name):
        return run.stages.directory / name
    set_seed(training_args.seed)
    trainer = Trainer(
        make(),
        training_args,
        train_dataset=run.splits["train"],
        eval_dataset=run.splits["validation"],
        processing_class=run.tokenizer,
        compute_metrics=lambda found: {"accuracy": float(np.mean(found.predictions.argmax(-1) == found.label_ids))},
        callbacks=callbacks,
    )
    trainer.train()
    if training_args.should_save:
        run.stages.run(name, lambda path: save(finished_model(trainer.model), run.tokenizer, path))
    training_args.distributed_state.wait_for_everyone()
    return run.stages.directory / name


def convert(run: Run, dense: Path, path: Path) -> None:
    model = run.load(dense)
    batches = Batches(run.splits["train"], run.tokenizer, shuffle=True, seed=run.config.seed)
    report = moefy_(model, run.config, batches)
    save(model, run.tokenizer, path)
    write_json(path / "conversion.json", report.to_dict())
    print(report.table(), flush=True)


def sweep(run: Run, moefied: Path, path: Path) -> None:
    """Validation and test together, under autocast where training was."""
    model = run.load(moefied, trust_remote_code=True)
    measured = run.moe_args.allocation == "sensitivity"
    allocations = ["uniform", "sensitivity"] if measured else ["uniform"]
    with run.autocast():
        found = evaluate(
            model, run.held_out(), run.moe_args.shares, controls=run.moe_args.controls, allocations=allocations
        )
    found.save(path)


def recover(run: Run, dense: Path, moefied: Path) -> None:
    """Fine-tune the converted model at its budget, the dense one for as many steps beside it, and compare."""
    moe_args, training_args = run.moe_args, recovery_arguments(run.training_args, run.moe_args)

    def converted() -> PreTrainedModel:
        return prepare(AutoModelForSequenceClassification.from_pretrained(moefied, trust_remote_code=True), moe_args)

    def control() -> PreTrainedModel:
        return prepare(AutoModelForSequenceClassification.from_pretrained(dense), moe_args)

    recovered = train(run, "recovered", training_args, converted, recovery_callbacks(moe_args, dense))
    trained_on = train(run, "control", training_args, control, penalties(moe_args))
    if not training_args.should_save:
        return
    run.stages.run("recovered.json", lambda path: sweep(run, recovered, path))
    run.stages.run("control.json", lambda path: write_json(path, {"accuracy": accuracy(run, trained_on)}))
    directory = run.stages.directory
    sweeps = {name: Sweep.load(directory / name) for name in ("sweep.json", "recovered.json")}
    print(summary(sweeps, json.loads((directory / "control.json").read_text())))


@torch.no_grad()
def accuracy(run: Run, folder: Path) -> float:
    """Of a dense model, on validation and test together."""
    model, quality = run.load(folder).eval(), Quality()
    with run.autocast():
        for batch in run.held_out():
            logits, labels = predictions(model, batch)
            quality.update_(logits, logits, labels)
    return quality.figures()["accuracy"]


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: Path) -> None:
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)


def show(directory: Path) -> None:
    found = Sweep.load(directory / "sweep.json")
    found.plot(directory / "sweep.png")
    print(found.table())
    for what, name in (("dense model", "dense"), ("MoEfied model", "moefied"), ("plot", "sweep.png")):
        print(f"{what}: {directory / name}")


if __name__ == "__main__":
    main()
