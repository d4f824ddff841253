"""Texts out of a file, a window at a time: memory does not grow with the file."""

import copy
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from ..data import check_plain_text, labelled_rows, opened

WINDOW = 32  # batches among which texts are sorted by length, so that little is padding


class TextStream:
    """Lines of a text file, or a csv file's columns `text` and `label`, as padded batches.

    They come in the file's order, but sorted by length within windows, and can be read any number of times.

    Args:
        path: of the file.
        config: the model's, for the names of classes; labels of a csv file are names that it knows, or class ids.
        max_length: tokens at which texts are cut off.
        batch_size: texts of a batch.
        limit: tokens after which no new window is begun.

    Raises:
        MoefyError: no such file or columns; while reading, a label that the model does not have.
    """

    def __init__(
        self,
        path: str,
        tokenizer: PreTrainedTokenizerBase,
        config: PreTrainedConfig,
        *,
        max_length: int = 256,
        batch_size: int = 32,
        limit: int | None = None,
    ):
        self.path, self.config, self.limit = path, config, limit
        self.max_length, self.batch_size = max_length, batch_size
        self.labelled = Path(path).suffix.lower() == ".csv"
        self.tokenizer = copy.deepcopy(tokenizer)
        if tokenizer.pad_token is None:
            self.tokenizer.pad_token = tokenizer.eos_token
        if not self.labelled:
            check_plain_text(path)
        next(self.rows(), None)  # what is wrong with the file as such is found now

    def rows(self) -> Iterator[tuple[str, int]]:
        """Yield (text, class id); 0 without labels."""
        if self.labelled:
            yield from ((text, label) for text, label in labelled_rows(self.path, self.config) if text)
            return
        with opened(self.path) as file:
            yield from ((line.strip(), 0) for line in file if line.strip())

    def windows(self) -> Iterator[tuple[list[list[int]], list[int]]]:
        """Yield token ids and class ids of some texts at a time."""
        rows, seen = self.rows(), 0
        while window := list(islice(rows, WINDOW * self.batch_size)):
            texts, labels = zip(*window, strict=True)
            ids = self.tokenizer(list(texts), truncation=True, max_length=self.max_length)["input_ids"]
            yield ids, list(labels)
            seen += sum(map(len, ids))
            if self.limit is not None and seen >= self.limit:
                return

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for ids, labels in self.windows():
            order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
            for start in range(0, len(order), self.batch_size):
                rows = order[start : start + self.batch_size]
                batch = self.tokenizer.pad(
                    {"input_ids": [ids[i] for i in rows]}, return_tensors="pt", padding_side="right"
                )
                yield {**batch, "labels": torch.tensor([labels[i] for i in rows])}
