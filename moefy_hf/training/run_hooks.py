"""Hooks that belong to one training run.

A Trainer does not tell its callbacks that a run was interrupted, so their hooks would stay on the model and act in the
next one. The next run takes them off.
"""

from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

_HOOKS: WeakKeyDictionary[nn.Module, tuple[Any, list]] = WeakKeyDictionary()  # model -> (its run's state, handles)


def keep_hooks(model: nn.Module, state: Any, handles: list) -> None:
    """Note hooks on a model as those of the run that `state` (a TrainerState) is of; remove those of other runs."""
    run, known = _HOOKS.get(model, (state, []))
    if run is not state:
        for handle in known:
            handle.remove()
        known = []
    _HOOKS[model] = (state, known + handles)
