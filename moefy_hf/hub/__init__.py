"""MoEfied checkpoints on the Hub: model card data, cards, verification and upload.

Example:
    >>> from moefy_hf.hub import add_facts, write_card
    >>> add_facts("my-moe", base_model="google-bert/bert-base-uncased", calibration="imdb")
    >>> write_card("my-moe", repo_id="me/my-moe")
"""

import importlib
from typing import TYPE_CHECKING, Any

from ..errors import PushError as PushError
from ..errors import VerificationError as VerificationError

_HOMES = {  # public name -> the module that has it, imported when the name is first used
    "add_facts": "facts",
    "model_card": "card",
    "push_to_hub": "push",
    "read_facts": "facts",
    "verify": "verification",
    "write_card": "card",
}
__all__ = sorted([*_HOMES, "PushError", "VerificationError"])

if TYPE_CHECKING:  # for editors and type checkers
    from .card import model_card as model_card
    from .card import write_card as write_card
    from .facts import add_facts as add_facts
    from .facts import read_facts as read_facts
    from .push import push_to_hub as push_to_hub
    from .verification import verify as verify


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value  # once
    return value


def __dir__() -> list[str]:
    return [*globals(), *_HOMES]
