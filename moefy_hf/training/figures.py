"""Figures in a Trainer's logs, for all callbacks that report them."""

import inspect
from typing import Any

from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_callback import CallbackHandler


class FiguresCallback(TrainerCallback):
    """Adds figures to the losses that a Trainer logs.

    Callbacks that report logs (those of `report_to` and others) see the figures wherever they stand in the Trainer's
    list: when training begins, callbacks of this class go to its front, in the order that they had.
    """

    def figures(self, args: TrainingArguments, state: Any) -> dict[str, float]:
        """Return the figures since the last call.

        Args:
            args: of the Trainer.
            state: of the Trainer.
        """
        raise NotImplementedError

    def on_train_begin(self, args, state, control, **kwargs):
        handler = handler_of(self)
        if handler is not None:  # a new list: the handler is going through the old one
            handler.callbacks = sorted(handler.callbacks, key=lambda each: not isinstance(each, FiguresCallback))

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs is not None and "loss" in logs:
            figures = self.figures(args, state)
            logs.update(figures)
            state.log_history[-1].update(figures)  # written before callbacks are asked


def handler_of(callback: TrainerCallback) -> CallbackHandler | None:
    """Return the handler that is calling a callback, or None where something else is.

    A Trainer tells its callbacks neither itself nor its handler, so this looks for the handler among the callers.

    Args:
        callback: one of the handler's.
    """
    frame = inspect.currentframe()
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, CallbackHandler) and callback in caller.callbacks:
            return caller
        frame = frame.f_back
    return None
