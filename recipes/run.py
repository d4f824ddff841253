"""A run of a classification recipe: what its stages share, and what is checked before the first of them."""

import json
from argparse import ArgumentTypeError
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import MoeficationArguments
from datasets import Dataset, DatasetDict, concatenate_datasets
from huggingface_hub import HfApi
from real_inputs import PREFIX
from recovery import check_recovery
from stages import Stages
from transformers import EvalPrediction, PreTrainedModel, Trainer, TrainingArguments

from moefy_hf import MoEficationConfig
from moefy_hf.arguments import name_and_number
from moefy_hf.evaluation.controls import check_control
from moefy_hf.hub.push import check_repository
from moefy_hf.io import is_hub_id
from moefy_hf.modeling.selection import SELECTIONS

# arguments that change no result
REPORTING = (
    *("redo", "output_dir", "run_name", "project", "logging_", "log_", "report_to", "disable_tqdm", "push_to_hub"),
    *("hub_", "local_rank", "dataloader_num_workers", "dataloader_p", "save_total_limit", "skip_memory_metrics"),
    "ddp_timeout",
)
# arguments that a later stage reads first: changing them keeps what the earlier ones made
CONVERSION = (
    *("num_experts", "expert_size", "splitter", "router", "router_settings", "shared_experts", "compensation"),
    *("share", "allocation", "calibration_tokens"),
)
SWEEP = ("shares", "controls", "selections")
RECOVERY = (
    *("recovery_epochs", "recovery_parameters", "lora_rank", "distillation_weight", "learned_eta", "learned_tau"),
    "schedule",
)
MODELS = {  # what the training or conversion of each model does not read
    "dense": (*CONVERSION, *RECOVERY),
    "moefied": RECOVERY,
    "recovered": ("schedule",),
    "control": (*CONVERSION, "distillation_weight", "learned_eta", "learned_tau", "schedule"),
    "scheduled": ("recovery_epochs", "recovery_parameters", "lora_rank", "learned_eta", "learned_tau"),
}
GENERATED = ("generated_rows", "generated_tokens")
UNUSED = {
    **{name: (*unused, *SWEEP, *GENERATED) for name, unused in MODELS.items()},
    **{f"{name}.json": (*unused, "controls", *GENERATED) for name, unused in MODELS.items()},
    **{f"generated_{name}.json": (*unused, "controls", "selections") for name, unused in MODELS.items()},
    "sweep.json": (*MODELS["moefied"], *GENERATED),
    "*-*.json": ("splitter", "router", *RECOVERY),  # the cells of sweep.py
}


@dataclass
class Run:
    """What the stages share.

    Attributes:
        splits: train, validation and test, with `labels`; `names` are those of the classes.
        processor: tokenizer or image processor, saved beside every model.
        auto: the AutoModel class that loads the models.
        batches: (rows, shuffle, seed) -> model-ready batches that can be read any number of times.
        collator: what the Trainer makes batches with; None for its own.
        task_type: peft's name of the task; None for those it has none for.
        trainer: the Trainer class, and `metrics` what it computes from predictions and labels.
    """

    moe_args: MoeficationArguments
    training_args: TrainingArguments
    stages: Stages
    splits: DatasetDict
    names: list[str]
    processor: Any
    auto: Any
    batches: Callable[[Dataset, bool, int], Iterable[dict[str, torch.Tensor]]]
    collator: Callable | None = None
    task_type: str | None = None
    trainer: type[Trainer] = Trainer
    metrics: Callable[[EvalPrediction], dict[str, float]] | None = None

    def autocast(self) -> torch.autocast:
        """As training is."""
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.training_args.mixed_precision)
        return torch.autocast(self.training_args.device.type, dtype, enabled=dtype is not None)

    def load(self, folder: Path, **kwargs) -> PreTrainedModel:
        """A model of this run, on the device that trains."""
        return self.auto.from_pretrained(folder, **kwargs).to(self.training_args.device)

    @property
    def config(self) -> MoEficationConfig:
        return moefication_config(self.moe_args, self.training_args.seed)

    def labels(self) -> dict[str, Any]:
        """What a model's config says of its classes."""
        return {
            "num_labels": len(self.names),
            "id2label": dict(enumerate(self.names)),
            "label2id": {name: position for position, name in enumerate(self.names)},
        }

    def calibration(self) -> Iterable[dict[str, torch.Tensor]]:
        return self.batches(self.splits["train"], True, self.config.seed)

    def measured_on(self) -> dict[str, str]:
        """Name and split of what `held_out` reads."""
        settings = self.stages.settings
        splits = dict.fromkeys((settings["validation_split"], settings["test_split"]))
        return {"data": public(settings["dataset_name"]), "split": " and ".join(splits)}

    def held_out(self, rows: int | None = None) -> Iterable[dict[str, torch.Tensor]]:
        """Validation and test together, or so many of their rows."""
        found = concatenate_datasets([self.splits["validation"], self.splits["test"]])
        if rows is not None:
            found = found.shuffle(seed=0).select(range(min(rows, len(found))))
        return self.batches(found, True, 0)


def public(name: str | Sequence[str]) -> str:
    """Models or data sets as others may read them: local folders without their path."""
    if not isinstance(name, str):
        return " and ".join(map(public, name))
    return name if is_hub_id(name) or name.startswith(PREFIX) else Path(name).name


def accuracy_of_classes(found: EvalPrediction) -> dict[str, float]:
    return {"accuracy": float(np.mean(found.predictions.argmax(-1) == found.label_ids))}


def begin_stages(
    moe_args: MoeficationArguments,
    training_args: TrainingArguments,
    *others: Any,
    unused: Mapping[str, Collection[str]] = UNUSED,
) -> Stages:
    """Find what is wrong with the settings before any work, and what an earlier run has finished."""
    training_args.remove_unused_columns = False
    moefication_config(moe_args, training_args.seed)
    if moe_args.controls == ["none"]:
        moe_args.controls = []
    check_sweep(moe_args)
    check_recovery(moe_args, training_args)
    check_push(training_args)
    settings = run_settings(*others, moe_args, training_args)
    ignored = [
        result
        for name in MODELS.keys() - set(models_of(moe_args))
        for result in (name, f"{name}.json", f"generated_{name}.json", f"prose_{name}.json")
    ]
    return Stages(training_args.output_dir, settings, moe_args.redo, unused, ignored)


def check_push(training_args: TrainingArguments) -> None:
    """Find what would stop the push at the end before any work; the Trainer itself pushes nothing.

    Raises:
        ValueError: no hub_model_id, or one that has no owner.
        PushError: no token, or a repository that holds something else.
    """
    if training_args.push_to_hub:
        if "/" not in (training_args.hub_model_id or ""):
            raise ValueError(
                f"push_to_hub needs hub_model_id, 'owner/name' of the repository; got {training_args.hub_model_id!r}"
            )
        check_repository(HfApi(token=training_args.hub_token), training_args.hub_model_id, None, False)
        training_args.push_to_hub = False
    else:
        training_args.hub_model_id = None


def models_of(moe_args: MoeficationArguments) -> list[str]:
    """The models that a run makes."""
    recovery = ["recovered", "control"] if moe_args.recovery_epochs else []
    return ["dense", "moefied", *recovery, *(["scheduled"] if moe_args.schedule else [])]


def moefication_config(moe_args: MoeficationArguments, seed: int) -> MoEficationConfig:
    selection = {"type": "top_k", "k": moe_args.share, "allocation": moe_args.allocation}
    return MoEficationConfig(
        num_experts=moe_args.num_experts,
        expert_size=moe_args.expert_size,
        splitter=moe_args.splitter,
        router=moe_args.router,
        router_settings=router_settings(moe_args),
        selection=selection,
        shared_experts=moe_args.shared_experts,
        compensation=moe_args.compensation,
        calibration_tokens=moe_args.calibration_tokens,
        seed=seed,
    )


def router_settings(moe_args: MoeficationArguments) -> dict[str, int | float]:
    """
    Raises:
        ValueError: one that is no NAME=NUMBER.
    """
    try:
        return dict(map(name_and_number, moe_args.router_settings or []))
    except ArgumentTypeError as error:
        raise ValueError(f"router_settings: {error}") from None


def check_sweep(moe_args: MoeficationArguments) -> None:
    for control in moe_args.controls:
        check_control(control)
    for kind in moe_args.selections:
        if kind not in SELECTIONS:
            raise ValueError(f"unknown selection {kind!r}; choose from {', '.join(SELECTIONS)}")
    for share in moe_args.shares:
        moefication_config(replace(moe_args, share=share), seed=0)


def swept(moe_args: MoeficationArguments) -> list[str]:
    """The allocations that a sweep compares: the one asked for, beside uniform budgets."""
    return list(dict.fromkeys(["uniform", moe_args.allocation]))


def run_settings(*arguments) -> dict:
    """What decides the results of a run, to notice when another run asks for something else in the same place."""
    settings: dict = {}
    for each in arguments:
        if isinstance(each, TrainingArguments):
            settings |= json.loads(each.to_json_string()) | {"mixed_precision": each.mixed_precision}
        else:
            settings |= asdict(each)
    return {name: value for name, value in settings.items() if not name.startswith(REPORTING)}
