"""Run by torchrun, one process or many: train with a callback, and save what this process ends with."""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

os.environ["HF_HUB_OFFLINE"] = "1"
from test_callback import SCHEDULE, callback_for, dense_model, losses_of, trainer_for  # noqa: E402
from test_learned_selection import moefied  # noqa: E402
from transformers import Trainer, TrainerCallback  # noqa: E402

from moefy_hf import LearnedSelectionCallback  # noqa: E402
from moefy_hf.recipes.settings import leave_processes  # noqa: E402


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


def main() -> None:
    folder, batch_size = Path(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(1)
    trainer = TRAINERS[sys.argv[3]](folder / "run", batch_size)
    trace = Trace()
    trainer.add_callback(trace)
    trainer.train()
    rank = int(os.environ.get("RANK", 0))
    found = {
        "state": trainer.model.state_dict(),
        "section": trainer.model.config.moefication,
        "digests": trace.digests,
        "losses": losses_of(trainer),
        "world": dist.get_world_size() if dist.is_initialized() else 1,
    }
    torch.save(found, folder / f"{rank}.pt")
    leave_processes()


if __name__ == "__main__":
    main()
