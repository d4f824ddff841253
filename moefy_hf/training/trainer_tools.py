"""What the Trainer callbacks of this package share."""

import os
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset
from tqdm.auto import tqdm
from transformers import TrainingArguments

from ..errors import MoefyError

SHARDED = (
    "{} keeps parameters in shards or copies, and neurons cannot be permuted in those: convert the model first "
    "(moefy_hf.moefy_), save it, and train the converted checkpoint sharded; the callback then only fine-tunes"
)
_HOOKS: WeakKeyDictionary[nn.Module, tuple[Any, list]] = WeakKeyDictionary()  # model -> (its run's state, handles)


def track_hooks(model: nn.Module, state: Any, handles: list) -> None:
    """Note the hooks of a training run, and remove those that an earlier run has left on the model.

    A Trainer does not tell its callbacks that a run was interrupted. The hooks of such a run would stay on the model,
    and act in the next run.

    Args:
        model: the model that has the hooks.
        state: the TrainerState of the run, which identifies it.
        handles: what registering the hooks returned.
    """
    run, tracked = _HOOKS.get(model, (state, []))
    if run is not state:
        for handle in tracked:
            handle.remove()
        tracked = []
    _HOOKS[model] = (state, tracked + handles)


def announce(args: TrainingArguments, state: Any, text: str) -> None:
    """Print a line about the current step, in the first process and where progress bars are on.

    Args:
        args: of the Trainer.
        state: of the Trainer.
        text: the line.
    """
    if state.is_world_process_zero and not args.disable_tqdm:
        tqdm.write(f"[moefy_hf] step {state.global_step}: {text}")


def refuse_sharded(args: TrainingArguments, reason: str = SHARDED) -> None:
    """Refuse a training that shards parameters.

    Args:
        args: of the Trainer.
        reason: the error's message, with a `{}` for what shards them.

    Raises:
        MoefyError: FSDP or DeepSpeed is on.
    """
    if is_enabled(args.fsdp, "ACCELERATE_USE_FSDP"):
        raise MoefyError(reason.format("FSDP"))
    if is_enabled(args.deepspeed, "ACCELERATE_USE_DEEPSPEED"):
        raise MoefyError(reason.format("DeepSpeed"))


def is_enabled(argument: Any, variable: str) -> bool:
    """Return whether a Trainer's argument is set, or the environment variable that `accelerate launch` sets for it."""
    return bool(argument) or os.environ.get(variable, "false").lower() in ("1", "true")


def preserve_random_state(args: TrainingArguments) -> Any:
    """Return a context after which random numbers go on as if nothing had been drawn within."""
    return torch.random.fork_rng([args.device] if args.device.type == "cuda" else [])


def training_batches(args: TrainingArguments, train_dataloader: DataLoader, seed: int) -> DataLoader:
    """Return the training set as calibration batches, in an order that depends on the seed alone.

    Reading them moves nothing in the Trainer's own loader.

    Args:
        args: of the Trainer; they give the batch size.
        train_dataloader: the Trainer's.
        seed: of the order; an IterableDataset keeps its own order.
    """
    dataset = train_dataloader.dataset
    return DataLoader(
        dataset,
        batch_size=args.per_device_train_batch_size,
        shuffle=not isinstance(dataset, IterableDataset),
        collate_fn=train_dataloader.collate_fn,
        generator=torch.Generator().manual_seed(seed),
    )
