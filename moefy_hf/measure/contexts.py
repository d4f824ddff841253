"""A model as it is wanted while something is measured; it comes back as it was."""

import contextlib
import copy
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from ..loading import MoefiedModel
from ..modeling.section import Section


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode for a while."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


@contextlib.contextmanager
def hooked(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Remove these hooks when the block ends, however it ends.

    Example:
        with hooked(site.down.register_forward_pre_hook(record) for site in sites):
            model(**batch)
    """
    handles = list(handles)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def selecting(model: MoefiedModel, **selection: Any) -> Iterator[None]:
    """Call `model.set_selection(**selection)` for a while.

    Raises:
        MoefyError: as `set_selection`; the selection is as it was then.
    """
    section = Section(model.config)
    before = copy.deepcopy(section.selection)
    model.set_selection(**selection)
    try:
        yield
    finally:
        section.selection = before  # as a whole: it may lack a key that was set meanwhile
        model.set_selection()


def all_experts(model: MoefiedModel) -> contextlib.AbstractContextManager[None]:
    """Let every FFN compute all its experts, which is the dense function, for a while."""
    return selecting(model, type="top_k", k=1.0, allocation="uniform")
