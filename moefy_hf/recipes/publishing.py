"""What the checkpoints of a run say of themselves: facts and a card in each folder, and the last one on the Hub."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..evaluation.sweep import Sweep
from ..hub.card import write_card
from ..hub.facts import add_facts, read_facts
from ..hub.push import push_to_hub
from .given import facts_of_given
from .inputs import public

if TYPE_CHECKING:
    from .run import Run

# settings of a training that a reader of its card wants to know
TRAINING = (
    *("recovery_epochs", "recovery_parameters", "schedule", "num_train_epochs", "distillation_weight"),
    *("learned_eta", "learned_tau", "sparsity_penalty", "sparsity_weight", "learning_rate"),
    *("per_device_train_batch_size", "seed"),
)
LAST = ("scheduled", "recovered", "moefied")  # which of a run's models is published


def describe_conversion(run: "Run", folder: Path, report: Any, prediction: Any = None) -> None:
    """Add to a checkpoint's facts what it was made of, how, and how good it is predicted to be."""
    base, data = run.arguments.model.model_name_or_path, public(run.arguments.data.dataset_name)
    add_facts(
        folder,
        base_model=public(base) if base else None,
        calibration={"data": data, "split": "train"},
        conversion=report,
        prediction=prediction,
    )


def describe_training(run: "Run", folder: Path, name: str) -> None:
    """Add to a checkpoint's facts how it was trained."""
    read = {key: value for part in run.stages.settings[name].values() for key, value in part.items()}
    unread = ("num_train_epochs",) if name == "recovered" else ()
    if name == "scheduled":
        describe_conversion(run, folder, None)
    else:
        known = facts_of_given(run) if run.arguments.recovers else read_facts(run.folder / "moefied")
        add_facts(folder, **{part: known.get(part) for part in ("base_model", "calibration", "conversion", "license")})
    training = {key: read[key] for key in TRAINING if read.get(key) is not None and key not in unread}
    add_facts(folder, training=training)


def describe_quality(run: "Run", folder: Path, sweep: Sweep) -> None:
    """Add a sweep to a checkpoint's facts, and write its card."""
    add_facts(folder, sweep=sweep, evaluation=run.measured_on())
    write_card(folder, overwrite=True)


def publish(run: "Run") -> None:
    """Push the last MoEfied model of the run, where that was asked for."""
    repository = run.training.hub_model_id
    if repository is not None:
        folder = run.folder / next(name for name in LAST if name in run.stages.plan)
        write_card(folder, repository, overwrite=True)
        private, token = run.training.hub_private_repo, run.training.hub_token
        commit = push_to_hub(folder, repository, private=private, token=token)
        print(f"{folder} is on the Hub: {commit.commit_url}")
