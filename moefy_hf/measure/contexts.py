"""A model as it is wanted while something is measured; it comes back as it was."""

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

from transformers import PreTrainedModel


@contextlib.contextmanager
def selecting(model: PreTrainedModel, **selection: Any) -> Iterator[None]:
    """`model.set_selection(**selection)` for a while."""
    section = model.config.moefication
    before = copy.deepcopy(section["selection"])
    model.set_selection(**selection)
    try:
        yield
    finally:
        section["selection"] = before  # as a whole: it may lack a key that was set meanwhile
        model.set_selection()


def all_experts(model: PreTrainedModel) -> contextlib.AbstractContextManager[None]:
    """The dense function, for a while."""
    return selecting(model, type="top_k", k=1.0, allocation="uniform")
