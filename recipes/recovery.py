"""Recovery: fine-tune a converted model at its budget or until it has learned one, and the dense one for as many steps
as a control."""

import copy
import math
from pathlib import Path
from typing import Any

import torch
from common import MoeficationArguments
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel, TrainerCallback, TrainingArguments

from moefy_hf import DistillationCallback, LearnedSelectionCallback, MoEficationCallback, SparsityPenaltyCallback
from moefy_hf.modeling.ffn_sites import find_sites
from moefy_hf.modeling.moefied import is_moefied
from moefy_hf.training.callback import refuse_sharded
from moefy_hf.training.learned_selection import SHARDED
from moefy_hf.training.schedule import Timetable, make_schedule

PARAMETERS = ("all", "down", "lora")


def check_recovery(moe_args: MoeficationArguments, training_args: TrainingArguments) -> None:
    """Find bad settings before any work."""
    if moe_args.recovery_parameters not in PARAMETERS:
        raise ValueError(
            f"unknown recovery_parameters {moe_args.recovery_parameters!r}; choose from {', '.join(PARAMETERS)}"
        )
    for name in ("recovery_epochs", "distillation_weight"):
        if getattr(moe_args, name) < 0:
            raise ValueError(f"{name} must not be negative, got {getattr(moe_args, name)}")
    if moe_args.schedule is not None:
        make_schedule(moe_args.schedule)
    if moe_args.lora_rank < 1:
        raise ValueError(f"lora_rank must be at least 1, got {moe_args.lora_rank}")
    if moe_args.learned_eta is not None:
        check_learned(moe_args, moe_args.learned_eta)
        refuse_sharded(training_args, SHARDED)
    elif moe_args.learned_tau is not None:
        raise ValueError(f"learned_tau {moe_args.learned_tau} is a setting of learned_eta: give that, too")


def check_learned(moe_args: MoeficationArguments, eta: float) -> None:
    if not 0 <= eta < math.inf:
        raise ValueError(f"learned_eta is a weight and must not be negative, got {eta}")
    if moe_args.learned_tau is not None and not 0 < moe_args.learned_tau < 1:
        raise ValueError(f"learned_tau must lie between 0 and 1, as strengths do, got {moe_args.learned_tau}")
    if moe_args.router != "sigmoid":
        raise ValueError(f"learned_eta needs router 'sigmoid', got {moe_args.router!r}")
    if not moe_args.recovery_epochs:
        raise ValueError(f"learned_eta {eta} is a setting of recovery: give recovery_epochs, too")
    if moe_args.compensation:
        raise ValueError("learned_eta moves what compensation adds: leave out one of them")


def check_schedule(moe_args: MoeficationArguments, training_args: TrainingArguments, rows: int) -> None:
    """Find what would stop the scheduled training before the dense one: sharding, or too few steps."""
    if moe_args.schedule is not None:
        refuse_sharded(training_args)
        step = training_args.train_batch_size * training_args.world_size * training_args.gradient_accumulation_steps
        steps = math.ceil(math.ceil(rows / step) * training_args.num_train_epochs)
        Timetable(make_schedule(moe_args.schedule), training_args.max_steps if training_args.max_steps > 0 else steps)


def recovery_arguments(training_args: TrainingArguments, moe_args: MoeficationArguments) -> TrainingArguments:
    """Those of the dense training, for the epochs of the recovery."""
    ours = copy.copy(training_args)
    ours.num_train_epochs, ours.max_steps = moe_args.recovery_epochs, -1
    return ours


def prepare(model: PreTrainedModel, moe_args: MoeficationArguments, task_type: str | None) -> PreTrainedModel:
    """Choose what is trained: everything, the FFNs' output projections only, or a LoRA on every Linear."""
    if moe_args.recovery_parameters == "lora":
        learned = ["router"] if moe_args.learned_eta is not None and is_moefied(model) else None
        settings = {"target_modules": "all-linear", "modules_to_save": learned, "task_type": task_type}
        return get_peft_model(model, LoraConfig(r=moe_args.lora_rank, **settings))
    if moe_args.recovery_parameters == "down":
        model.requires_grad_(False)
        for site in find_sites(model):
            site.down.requires_grad_(True)
    return model


def finished_model(model: torch.nn.Module) -> PreTrainedModel:
    """Adapters merged."""
    return model.merge_and_unload() if isinstance(model, PeftModel) else model


def penalties(moe_args: MoeficationArguments) -> list[TrainerCallback]:
    if moe_args.sparsity_penalty is None:
        return []
    return [SparsityPenaltyCallback(moe_args.sparsity_penalty, moe_args.sparsity_weight)]


def recovering(moe_args: MoeficationArguments) -> TrainerCallback:
    """At the budget that the model has, or one that it learns; the latter trains the routers, too."""
    if moe_args.learned_eta is None:
        return MoEficationCallback()
    settings = {} if moe_args.learned_tau is None else {"tau": moe_args.learned_tau}
    return LearnedSelectionCallback(moe_args.learned_eta, **settings)


def following(
    callback: TrainerCallback, auto: Any, moe_args: MoeficationArguments, dense: Path
) -> list[TrainerCallback]:
    """The callback, and what pulls its model towards sparsity and the dense model."""
    callbacks = [callback, *penalties(moe_args)]
    if moe_args.distillation_weight:
        teacher = auto.from_pretrained(dense)
        callbacks.append(DistillationCallback(teacher, moe_args.distillation_weight))
    return callbacks
