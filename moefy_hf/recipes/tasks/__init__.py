"""The tasks of `moefy train` and of the scripts in recipes/: a module each, with what is its own; base.py is the rest.

Nothing is imported before a task is asked for, so that a command line that lists them starts fast.
"""

from collections.abc import Sequence
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .base import Task

TASKS = {  # name of the task and of its module: what it is for
    "classification": "encoders: a label for each text",
    "token_classification": "encoders: a tag for each word, such as names or parts of speech",
    "question_answering": "encoders: the span of a text that answers a question",
    "seq2seq": "encoder-decoders: a text for each text",
    "causal_lm": "language models: the next token",
    "image_classification": "vision Transformers: a label for each image",
}


def task(name: str) -> "Task":
    """Return the task of this name, one of `TASKS`."""
    return vars(import_module(f".{name}", __package__))["TASK"]


def main(name: str, words: Sequence[str] | None = None) -> None:
    """Run a task as a script does, and print the table at its end.

    Args:
        name: one of `TASKS`.
        words: instead of the process' command line.
    """
    from .base import run

    if (result := run(task(name), words)) is not None:
        print(result["table"])
