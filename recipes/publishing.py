"""What the checkpoints of a run say of themselves: facts and a card in each folder, and the last one on the Hub."""

from pathlib import Path
from typing import Any

from run import MODELS, Run, models_of, public

from moefy_hf import Sweep, push_to_hub
from moefy_hf.hub.card import write_card
from moefy_hf.hub.facts import add_facts, read_facts

# settings of a training that a reader of its card wants to know
TRAINING = (
    *("recovery_epochs", "recovery_parameters", "schedule", "num_train_epochs", "distillation_weight"),
    *("learned_eta", "learned_tau", "sparsity_penalty", "sparsity_weight", "learning_rate"),
    *("per_device_train_batch_size", "seed"),
)


def describe_conversion(run: Run, folder: Path, report: Any, prediction: Any = None) -> None:
    base = run.stages.settings.get("model_name_or_path")
    data = {"data": public(run.stages.settings["dataset_name"]), "split": "train"}
    base = public(base) if base else None
    add_facts(folder, base_model=base, calibration=data, conversion=report, prediction=prediction)


def describe_training(run: Run, folder: Path, name: str) -> None:
    """How one of the MODELS was trained."""
    settings = run.stages.settings
    unread = (*MODELS[name], *(["num_train_epochs"] if name == "recovered" else []))
    found = {key: settings[key] for key in TRAINING if settings.get(key) is not None and key not in unread}
    if name == "scheduled":
        describe_conversion(run, folder, None)
    else:
        known = read_facts(run.stages.directory / "moefied")
        add_facts(folder, **{part: known.get(part) for part in ("base_model", "calibration", "conversion", "license")})
    add_facts(folder, training=found)


def describe_quality(run: Run, folder: Path, sweep: Sweep) -> None:
    add_facts(folder, sweep=sweep, evaluation=run.measured_on())
    write_card(folder, overwrite=True)


def publish(run: Run) -> None:
    """Push the last MoEfied model of the run, where that was asked for."""
    args = run.training_args
    if args.hub_model_id is not None:
        last = next(name for name in ("scheduled", "recovered", "moefied") if name in models_of(run.moe_args))
        folder = run.stages.directory / last
        write_card(folder, args.hub_model_id, overwrite=True)
        commit = push_to_hub(folder, args.hub_model_id, private=args.hub_private_repo, token=args.hub_token)
        print(f"{folder} is on the Hub: {commit.commit_url}")
