"""A loss of our own on top of the one that a model returns: what the sparsity penalty and distillation share."""

from typing import Any

import torch
from transformers import PreTrainedModel, TrainerCallback

from .run_hooks import keep_hooks


class ExtraLossCallback(TrainerCallback):
    """Adds `weight` times a value to the training loss, and logs that value as `name`.

    It is added to the loss the model itself returns, so loss scaling and DDP treat it as part of that loss; over
    accumulated batches and processes it is a mean. Usable with any Trainer whose model computes its own loss.

    A subclass says what to watch during the forward pass (`watch`) and what came of it (`value`).

    Raises:
        ValueError: negative weight; in training, when the model returns no loss.
    """

    name: str

    def __init__(self, weight: float):
        if not weight >= 0:
            raise ValueError(f"the weight of {self.name} must not be negative, got {weight}")
        self.weight = weight
        self.handles: list = []
        self.batch: dict[str, Any] = {}
        self.logged, self.steps = torch.zeros(()), 0
        self.summed, self.share = 1, 1.0
        self.running = False  # a forward pass, not its repetition under gradient checkpointing

    def watch(self, model: PreTrainedModel) -> list:
        """Register hooks; they are removed after training."""
        return []

    def begin(self) -> None:
        """A batch is about to run: forget the one before."""

    def value(self, model: PreTrainedModel, output: Any) -> torch.Tensor | None:
        """() what `self.batch` costs; None for nothing."""
        raise NotImplementedError

    def on_train_begin(self, args, state, control, model, **kwargs):
        if args.n_gpu > 1:
            raise ValueError(f"{self.name} does not work with DataParallel: use torchrun, or one GPU")
        self.on_train_end(args, state, control)
        self.summed = args.gradient_accumulation_steps * (args.world_size if args.average_tokens_across_devices else 1)
        self.handles = self.watch(model)
        self.handles.append(model.register_forward_pre_hook(self._start, with_kwargs=True))
        self.handles.append(model.register_forward_hook(self._add))
        keep_hooks(model, state, self.handles)

    def on_train_end(self, args, state, control, **kwargs):
        for handle in self.handles:
            handle.remove()
        self.handles, self.batch = [], {}
        self.begin()

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs is not None and self.steps and "loss" in logs:
            logs[self.name] = float(self.logged) / self.steps
            state.log_history[-1][self.name] = logs[self.name]  # written before callbacks are asked
            self.logged, self.steps = torch.zeros(()), 0

    def _start(self, model: PreTrainedModel, args: tuple, kwargs: dict) -> None:
        self.batch, self.running = kwargs, True
        self.begin()
        # given the number of items of all accumulated batches, a loss is a part of their mean: the Trainer adds such
        # losses up, where it would average others
        self.share = 1.0 if kwargs.get("num_items_in_batch") is None else 1 / self.summed

    def _add(self, model: PreTrainedModel, args: tuple, output):
        self.running = False
        value = self.value(model, output) if model.training else None
        if value is None:
            return
        if getattr(output, "loss", None) is None:
            raise ValueError(
                f"{self.name} needs a model that returns its loss; label smoothing hides the labels from it"
            )
        self.logged, self.steps = self.logged + value.detach().cpu(), self.steps + 1
        output["loss"] = output.loss + self.share * self.weight * value
