"""Training with a callback, in one process or in one of several."""

from pathlib import Path
from typing import Any

import torch.distributed as dist
from test_callback import SCHEDULE, callback_for, dense_model, losses_of, trainer_for
from test_learned_selection import moefied
from transformers import Trainer, TrainerCallback

from moefy_hf import LearnedSelectionCallback


class Trace(TrainerCallback):
    """A digest of weights, routers and moments after every step."""

    def __init__(self):
        self.digests = []

    def on_step_begin(self, args, state, control, model, optimizer, **kwargs):
        moments = [value for entry in optimizer.state.values() for value in entry.values() if value.dim()]
        tensors = [*model.state_dict().values(), *moments]
        self.digests.append([float(tensor.double().square().sum()) for tensor in tensors])


def schedule(folder: Path, batch_size: int) -> Trainer:
    selection = {"type": "top_k", "k": 1 / 3, "allocation": "uniform"}
    model, callback = dense_model("llama", dropout=0.0), callback_for(SCHEDULE, selection=selection)
    return trainer_for(model, folder, callback, "llama", per_device_train_batch_size=batch_size)


def learned(folder: Path, batch_size: int) -> Trainer:
    """With checkpointed layers, where DDP waits for a gradient of every parameter."""
    model, callback = moefied("llama", dropout=0.0), LearnedSelectionCallback(5.0, until=7)
    settings = {"per_device_train_batch_size": batch_size, "gradient_checkpointing": True, "weight_decay": 0.1}
    return trainer_for(model, folder, callback, "llama", **settings)


TRAINERS = {"schedule": schedule, "learned": learned}


def results(name: str, folder: Path, batch_size: int) -> dict[str, Any]:
    """What this process, alone or one of several, ends with."""
    trainer, trace = TRAINERS[name](folder / name, batch_size), Trace()
    trainer.add_callback(trace)
    trainer.train()
    return {
        "state": trainer.model.state_dict(),
        "section": trainer.model.config.moefication,
        "digests": trace.digests,
        "losses": losses_of(trainer),
        "world": dist.get_world_size() if dist.is_initialized() else 1,
    }
