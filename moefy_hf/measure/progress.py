"""The bars that count tokens and batches."""

from collections.abc import Iterable, Mapping, Sized
from typing import Any

from tqdm.auto import tqdm

from .processes import Processes


def token_bar(tokens: int, title: str, progress: bool, done: int = 0) -> tqdm:
    """Return a bar over so many tokens, which is drawn anew with every update that comes half a second after another.

    Update it per layer, by the layer's share of the tokens: one batch of a large model may take minutes.

    Args:
        tokens: how many there are.
        title: what is done with them.
        progress: whether the bar is shown.
        done: how many were done before.
    """
    return tqdm(
        total=tokens,
        initial=done,
        unit="token",
        unit_scale=True,
        desc=title,
        disable=not progress,
        mininterval=0.5,
        miniters=0,
    )


def shared_batches(
    batches: Iterable[Mapping[str, Any]], title: str, processes: Processes, progress: bool
) -> "tqdm[Mapping[str, Any]]":
    """Return a bar over this process' part of batches."""
    total = len(range(processes.rank, len(batches), processes.size)) if isinstance(batches, Sized) else None
    return tqdm(processes.share(batches), desc=title, unit="batch", total=total, disable=not progress)
