"""Texts a window at a time: memory does not grow with their number."""

from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from ..data import CutTexts, TextRows, Texts, padding

WINDOW = 32  # batches among which texts are sorted by length, so that little is padding


class TextStream:
    """Rows of a table, with class ids where it has some, as padded batches.

    They come in the table's order, but sorted by length within windows, and can be read any number of times.

    Args:
        rows: the texts.
        tokenizer: of the model that reads them.
        max_length: tokens at which texts are cut off.
        batch_size: texts of a batch.
        limit: tokens after which no new window is begun.

    Example:
        >>> stream = TextStream(TextSource("reviews.csv").open().rows(model, labels=True), tokenizer)
    """

    def __init__(
        self,
        rows: TextRows,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_length: int = 256,
        batch_size: int = 32,
        limit: int | None = None,
    ):
        self.rows, self.limit = rows, limit
        self.max_length, self.batch_size = max_length, batch_size
        self.tokenizer = padding(tokenizer)
        self.cut = CutTexts(self.tokenizer, max_length)

    @property
    def labelled(self) -> bool:
        """Return whether the texts have class ids."""
        return self.rows.labelled

    @property
    def path(self) -> str:
        """Return what errors call the texts."""
        return self.rows.path

    def windows(self) -> Iterator[tuple[dict[str, list[list[int]]], list[int]]]:
        """Yield what the tokenizer makes of some texts at a time, a list per text, and their class ids, or 0."""
        rows, seen = iter(self.rows), 0
        with self.cut:
            while window := list(islice(rows, WINDOW * self.batch_size)):
                part = Texts.of(window)
                encoded = dict(self.tokenizer(part.texts, part.pairs, truncation=True, max_length=self.max_length))
                lengths = [len(ids) for ids in encoded["input_ids"]]
                self.cut.count(part, lengths)
                yield encoded, part.labels or [0] * len(part)
                seen += sum(lengths)
                if self.limit is not None and seen >= self.limit:
                    return

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for encoded, labels in self.windows():
            order = sorted(range(len(labels)), key=lambda i: len(encoded["input_ids"][i]))
            for start in range(0, len(order), self.batch_size):
                rows = order[start : start + self.batch_size]
                batch = self.tokenizer.pad(
                    {name: [values[i] for i in rows] for name, values in encoded.items()},
                    return_tensors="pt",
                    padding_side="right",
                )
                yield {**batch, "labels": torch.tensor([labels[i] for i in rows])}
