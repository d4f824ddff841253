"""`--recover`: a run that begins with a MoEfied checkpoint, whose dense self is the same weights with all experts."""

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel
from transformers.utils import cached_file

from ..config import SETTINGS, MoEficationConfig
from ..errors import MoefyError, NotMoefied
from ..hub.card import auto_class
from ..hub.facts import FILE
from ..loading import checkpoint_class, load, read_config
from ..modeling.section import Section
from .arguments import EvaluationArguments, RecoverArguments, RecoveryArguments, ScheduleArguments

if TYPE_CHECKING:
    from .run import Run
    from .settings import Arguments

KEPT = ("model_revision", "dtype", "attn_implementation", "trust_remote_code")  # of the settings of models
GIVEN = ("dense", "moefied")  # models that the checkpoint is


def take_up(arguments: "Arguments") -> "Arguments":
    """Return the settings of a recovery: the checkpoint's own, where a file says how another one is made.

    Raises:
        MoefyError: a conversion while training is asked for, too.
        NotMoefied: the checkpoint is dense.
        OSError: there is no such checkpoint.
    """
    name, model = arguments[RecoverArguments].recover or "", arguments.model
    if ScheduleArguments in arguments and arguments[ScheduleArguments].schedule:
        raise MoefyError("schedule converts while training, and recover begins with a converted model: choose one")
    own = type(model)(model_name_or_path=name, **{key: vars(model)[key] for key in KEPT if key in vars(model)})
    section = Section.of(config_of(own))
    if section is None:
        raise NotMoefied(f"{name} is not MoEfied: moefy convert makes a checkpoint that can be recovered")
    config = MoEficationConfig(**{key: section.values[key] for key in SETTINGS if key in section.values})
    evaluation, recovery = arguments[EvaluationArguments], arguments[RecoveryArguments]
    budgets = {*evaluation.budgets, *([config.k] if isinstance(config.k, float) else [])}
    return arguments.replaced(
        own,
        config,
        replace(evaluation, budgets=sorted(budgets)),
        replace(recovery, recovery_epochs=recovery.recovery_epochs or 1.0),
    )


def config_of(model: Any) -> Any:
    """Read the config of the checkpoint that the settings of a model name."""
    trust = vars(model).get("trust_remote_code", False)
    return read_config(model.model_name_or_path, model.model_revision, trust_remote_code=trust)


def check_given(run: "Run") -> None:
    """Find out whether the checkpoint is of this task and of these classes.

    Raises:
        MoefyError: it has another head, or other classes.
    """
    name, config = run.arguments.recovers, config_of(run.arguments.model)
    if (head := auto_class(config.to_dict())) != run.auto.__name__:
        raise MoefyError(f"{name} is a model of {head}, and this task is of {run.auto.__name__}")
    labels = [config.id2label[number] for number in range(config.num_labels)] if run.names else []
    unnamed = len(labels) == len(run.names) and all(str(label).startswith("LABEL_") for label in labels)
    if labels != run.names and not unnamed:
        raise MoefyError(f"{name} has the classes {', '.join(labels)}, the data {', '.join(run.names)}, in this order")


def fetch_given(run: "Run", name: str) -> PreTrainedModel:
    """Load the checkpoint with this package's code: as it is, or as the dense model that it is with all experts.

    Args:
        run: of the recovery.
        name: of `GIVEN`.
    """
    model = run.arguments.model
    place, trust = model.model_name_or_path, vars(model).get("trust_remote_code", False)
    settings = {"dtype": vars(model).get("dtype", "float32"), "revision": model.model_revision}
    if name == "moefied":
        return load(place, head=run.auto.__name__, trust_remote_code=trust, **settings)
    cls: Any = checkpoint_class(
        config_of(model), run.auto.__name__, trust_remote_code=trust, revision=model.model_revision
    )
    return cls.stock_class().from_pretrained(place, **settings)


def facts_of_given(run: "Run") -> dict[str, Any]:
    """Return the model card data that came with the checkpoint, none where there are none."""
    model = run.arguments.model
    missing = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    path = cached_file(model.model_name_or_path, FILE, revision=model.model_revision, **missing)
    if path is None:
        return {}
    with open(path, encoding="utf-8") as file:
        return json.load(file)
