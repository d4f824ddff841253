"""What was read: texts, and what belongs to them."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple, cast

from tqdm.auto import tqdm
from transformers.utils import logging

logger = logging.get_logger("moefy_hf")


def say(line: str) -> None:
    """Say something about texts in a line of its own, also while a progress bar is shown."""
    with tqdm.external_write_mode():
        logger.warning(line)


class Row(NamedTuple):
    """A text, the second text that is read with it, its class id, and what a model is to write; None: it has none."""

    text: str
    pair: str | None = None
    label: int | None = None
    target: str | None = None


@dataclass(frozen=True)
class Texts:
    """Texts that were read. What only some tables have is None, or as long as `texts`.

    Attributes:
        texts: the texts.
        pairs: second texts, which are tokenised together with the first.
        labels: class ids of the model.
        targets: what an encoder-decoder is to write.

    Example:
        >>> Texts(["a film to see twice", "not even once"], labels=[1, 0])
    """

    texts: list[str]
    pairs: list[str] | None = None
    labels: list[int] | None = None
    targets: list[str] | None = None

    @classmethod
    def of(cls, rows: Iterable[Row]) -> "Texts":
        """Return rows, which are all alike, as columns."""
        columns = [list(column) for column in zip(*rows, strict=True)] or [[]]
        known = [column if column and column[0] is not None else None for column in columns]
        return cls(cast(list[str], columns[0]), *known[1:])  # type: ignore[arg-type]

    def __len__(self) -> int:
        return len(self.texts)

    def select(self, rows: Iterable[int]) -> "Texts":
        """Return the rows at these positions, in this order."""
        rows = list(rows)
        return Texts(*(column and [column[row] for row in rows] for column in vars(self).values()))

    def unlabelled(self) -> "Texts":
        """Return what is read alone."""
        return replace(self, labels=None, targets=None)


def split_off(texts: Texts, every: int = 20, most: int = 64) -> tuple[Texts, Texts]:
    """Hold out every twentieth text, or 64 of more; return the texts to fit on, and those to check quality on.

    Nothing is held out of a single text.

    Args:
        texts: that are parted.
        every: which text is held out.
        most: texts that are held out, about, where there are many.
    """
    if len(texts) == 1:
        return texts, texts.select([])
    step = max(every, len(texts) // most)
    rows = range(len(texts))
    return texts.select(row for row in rows if row % step), texts.select(rows[::step])
