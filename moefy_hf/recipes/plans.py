"""The stages of recipes that train a dense model first: what each reads, and after which it comes."""

from transformers import TrainingArguments

from ..config import MoEficationConfig
from .arguments import (
    ControlArguments,
    DistillationArguments,
    EvaluationArguments,
    GenerationArguments,
    LearnedArguments,
    MetricArguments,
    RecoverArguments,
    RecoveryArguments,
    ScheduleArguments,
    SparsityArguments,
    TimingArguments,
)
from .given import GIVEN
from .settings import Arguments
from .stages import Stage

DENSE = ("dense", "control")
BEGUN = ("dense", "moefied", "recovered", "control", "scheduled")  # models, in the order in which they are made


def training_plan(arguments: Arguments) -> dict[str, Stage]:
    """Return the stages that such a recipe makes with these arguments."""
    trained = (type(arguments.model), type(arguments.data), SparsityArguments, TrainingArguments)
    plan = {
        "dense": Stage(trained),
        "moefied": Stage((MoEficationConfig,), after=("dense",)),
        "sweep.json": Stage((EvaluationArguments, ControlArguments), after=("moefied",)),
    }
    if arguments.recovers:
        plan = given_plan(arguments)
    if arguments[RecoveryArguments].recovery_epochs:
        plan["recovered"] = Stage(
            (RecoveryArguments, DistillationArguments, LearnedArguments, SparsityArguments, TrainingArguments),
            after=("moefied",),
        )
        plan["recovered.json"] = Stage((EvaluationArguments,), after=("recovered",))
    if arguments[RecoveryArguments].recovery_epochs and not arguments.recovers:
        plan["control"] = Stage((RecoveryArguments, TrainingArguments), after=("dense",))
        plan["control.json"] = Stage(after=("control",))
    if arguments[ScheduleArguments].schedule:
        plan["scheduled"] = Stage((MoEficationConfig, ScheduleArguments, DistillationArguments), after=("dense",))
        plan["scheduled.json"] = Stage((EvaluationArguments,), after=("scheduled",))
    judged = (MetricArguments, GenerationArguments) if GenerationArguments in arguments else (MetricArguments,)
    if arguments[MetricArguments].metrics:
        for name in models(plan):
            budgets = () if name in ("dense", "control") else (EvaluationArguments,)
            plan[f"scores_{name}.json"] = Stage((*judged, *budgets), after=(name,))
    if arguments[TimingArguments].timed_batches:
        plan["times.json"] = Stage((EvaluationArguments, TimingArguments), after=("moefied",))
    return plan


def given_plan(arguments: Arguments) -> dict[str, Stage]:
    """Return the stages that a recovery begins with: nothing is made in them, and others come after them."""
    return dict.fromkeys(GIVEN, Stage((RecoverArguments, type(arguments.model), type(arguments.data))))


def models(plan: dict[str, Stage]) -> list[str]:
    """Name the models that a plan makes."""
    return [name for name in BEGUN if name in plan]
