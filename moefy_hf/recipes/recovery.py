"""Recovery: what is trained after a conversion, what pulls on it, and what is checked before."""

import copy
import math
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel, TrainerCallback, TrainingArguments

from ..config import MoEficationConfig
from ..errors import MoefyError
from ..measure.metrics import is_adapted
from ..modeling.ffn_sites import find_sites
from ..modeling.moefied import is_moefied
from ..training.callback import MoEficationCallback, refuse_sharded
from ..training.distillation import DistillationCallback
from ..training.learned_selection import SHARDED, LearnedSelectionCallback
from ..training.schedule import Timetable, make_schedule
from ..training.sparsity import SparsityPenaltyCallback
from .arguments import (
    DistillationArguments,
    LearnedArguments,
    RecoveryArguments,
    ScheduleArguments,
    SparsityArguments,
)

if TYPE_CHECKING:
    from .run import Run
    from .settings import Arguments

PARAMETERS = ("all", "down", "lora")


def check_recovery(arguments: "Arguments") -> None:
    """Find bad settings of trainings after a conversion before any work.

    Raises:
        MoefyError: an unknown name, a number out of range, or settings that exclude each other.
    """
    recovery, weight = arguments[RecoveryArguments], arguments[DistillationArguments].distillation_weight or 0
    if recovery.recovery_parameters not in PARAMETERS:
        raise MoefyError(
            f"unknown recovery_parameters {recovery.recovery_parameters!r}; choose from {', '.join(PARAMETERS)}"
        )
    for name, value in (("recovery_epochs", recovery.recovery_epochs), ("distillation_weight", weight)):
        if value < 0:
            raise MoefyError(f"{name} must not be negative, got {value}")
    if recovery.lora_rank < 1:
        raise MoefyError(f"lora_rank must be at least 1, got {recovery.lora_rank}")
    if ScheduleArguments in arguments and (schedule := arguments[ScheduleArguments].schedule) is not None:
        make_schedule(schedule)
    penalties(arguments[SparsityArguments])
    learned = arguments[LearnedArguments]
    if learned.learned_eta is not None:
        check_learned(learned, recovery, arguments[MoEficationConfig])
        refuse_sharded(arguments[TrainingArguments], SHARDED)
    elif learned.learned_tau is not None:
        raise MoefyError(f"learned_tau {learned.learned_tau} is a setting of learned_eta: give that, too")


def check_learned(learned: LearnedArguments, recovery: RecoveryArguments, config: MoEficationConfig) -> None:
    """Find what would stop a selection from being learned."""
    eta, tau = learned.learned_eta, learned.learned_tau
    if eta is None or not 0 <= eta < math.inf:
        raise MoefyError(f"learned_eta is a weight and must not be negative, got {eta}")
    if tau is not None and not 0 < tau < 1:
        raise MoefyError(f"learned_tau must lie between 0 and 1, as routing weights do, got {tau}")
    if config.router != "sigmoid":
        raise MoefyError(f"learned_eta needs router 'sigmoid', got {config.router!r}")
    if not recovery.recovery_epochs:
        raise MoefyError(f"learned_eta {eta} is a setting of recovery: give recovery_epochs, too")
    if config.compensation:
        raise MoefyError("learned_eta moves what compensation adds: leave out one of them")


def check_schedule(schedule: str | None, training: TrainingArguments, rows: int) -> None:
    """Find what would stop the scheduled training before the dense one: sharding, or too few steps."""
    if schedule is not None:
        refuse_sharded(training)
        step = training.train_batch_size * training.world_size * training.gradient_accumulation_steps
        steps = math.ceil(math.ceil(rows / step) * training.num_train_epochs)
        Timetable(make_schedule(schedule), training.max_steps if training.max_steps > 0 else steps)


def recovery_arguments(arguments: "Arguments") -> TrainingArguments:
    """Return those of the dense training, for the epochs of the recovery; max_steps are of the first training."""
    changed = copy.copy(arguments[TrainingArguments])
    changed.num_train_epochs = arguments[RecoveryArguments].recovery_epochs
    if arguments.recovers is None:
        changed.max_steps = -1
    return changed


def prepare(
    model: PreTrainedModel, recovery: RecoveryArguments, learned: LearnedArguments, task_type: str | None
) -> Any:
    """Choose what is trained: everything, the FFNs' output projections only, or a LoRA on every Linear."""
    if recovery.recovery_parameters == "lora":
        from peft import LoraConfig, get_peft_model

        routers = ["router"] if learned.learned_eta is not None and is_moefied(model) else None
        settings: dict[str, Any] = {"modules_to_save": routers, "task_type": task_type}
        return get_peft_model(model, LoraConfig(r=recovery.lora_rank, target_modules="all-linear", **settings))
    if recovery.recovery_parameters == "down":
        model.requires_grad_(False)
        for site in find_sites(model):
            site.down.requires_grad_(True)
    return model


def merged(model: Any) -> PreTrainedModel:
    """Return a trained model with its adapters, if it has any, in its weights."""
    return model.merge_and_unload() if is_adapted(model) else model


def penalties(sparsity: SparsityArguments) -> list[TrainerCallback]:
    """Return the callbacks that make activations sparse, none where no penalty is asked for."""
    if sparsity.sparsity_penalty is None:
        return []
    return [SparsityPenaltyCallback(sparsity.sparsity_penalty, sparsity.sparsity_weight)]


def recovering(learned: LearnedArguments) -> TrainerCallback:
    """Return what trains a MoEfied model at the budget it has, or at one it learns, with its routers."""
    if learned.learned_eta is None:
        return MoEficationCallback()
    settings = {} if learned.learned_tau is None else {"tau": learned.learned_tau}
    return LearnedSelectionCallback(learned.learned_eta, **settings)


def teaching(run: "Run") -> list[TrainerCallback]:
    """Return what pulls a MoEfied model towards sparsity and the dense model."""
    callbacks = penalties(run.arguments[SparsityArguments])
    weight = run.arguments[DistillationArguments].distillation_weight
    if weight:
        callbacks.append(DistillationCallback(run.fetch("dense"), weight))
    return callbacks
