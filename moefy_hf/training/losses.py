"""A loss of our own on top of the one that a model returns: what the sparsity penalty and distillation share."""

from typing import Any

import torch
from transformers import PreTrainedModel

from ..errors import MoefyError
from .figures import FiguresCallback
from .trainer_tools import track_hooks


class ExtraLossCallback(FiguresCallback):
    """Adds `weight` times a value to the training loss, and logs that value as `name`.

    It is added to the loss that the model itself returns, so loss scaling and DDP treat it as part of that loss. Over
    accumulated batches and processes it is a mean. It works with any Trainer whose model computes its own loss.

    A subclass defines `watch`, which registers hooks for the forward pass, and `value`, which is computed after it.

    Args:
        weight: factor of the value, at least 0.

    Raises:
        MoefyError: a negative weight; in training, DataParallel or a model that returns no loss.
    """

    name: str

    def __init__(self, weight: float):
        if not weight >= 0:
            raise MoefyError(f"the weight of {self.name} must not be negative, got {weight}")
        self.weight = weight
        self.handles: list = []
        self.batch: dict[str, Any] = {}
        self.logged, self.steps = torch.zeros(()), 0
        self.summed, self.share = 1, 1.0
        self.running = False  # a forward pass, not its repetition under gradient checkpointing

    def watch(self, model: PreTrainedModel) -> list:
        """Register hooks on a model; return their handles, which are removed after training."""
        return []

    def begin(self) -> None:
        """Forget the batch before: another one is about to run."""

    def value(self, model: PreTrainedModel, output: Any) -> torch.Tensor | None:
        """Return the value of `self.batch`, of shape (), or None where there is nothing to add.

        Args:
            model: the model in training.
            output: what it returned for the batch.
        """
        raise NotImplementedError

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        super().on_train_begin(args, state, control)
        if args.n_gpu > 1:
            raise MoefyError(f"{self.name} does not work with DataParallel: use torchrun, or one GPU")
        self.on_train_end(args, state, control)
        self.summed = args.gradient_accumulation_steps * (args.world_size if args.average_tokens_across_devices else 1)
        self.handles = self.watch(model)
        self.handles.append(model.register_forward_pre_hook(self._start, with_kwargs=True))
        self.handles.append(model.register_forward_hook(self._add))
        track_hooks(model, state, self.handles)

    def on_train_end(self, args, state, control, **kwargs):
        for handle in self.handles:
            handle.remove()
        self.handles, self.batch = [], {}
        self.begin()

    def figures(self, args, state) -> dict[str, float]:
        figures = {self.name: float(self.logged) / self.steps} if self.steps else {}
        self.logged, self.steps = torch.zeros(()), 0
        return figures

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
            raise MoefyError(
                f"{self.name} needs a model that returns its loss; label smoothing hides the labels from it"
            )
        self.logged, self.steps = self.logged + value.detach().cpu(), self.steps + 1
        output["loss"] = output.loss + self.share * self.weight * value
