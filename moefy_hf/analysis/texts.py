"""Texts out of a file, a window at a time: memory does not grow with the file."""

import copy
import csv
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from ..text_files import classes_of

WINDOW = 32  # batches among which texts are sorted by length, so that little is padding


class TextStream:
    """Lines of a text file, or a csv file's columns `text` and `label`, as padded batches in the file's order, sorted
    by length within windows; can be read any number of times.

    Args:
        config: for the names of classes; labels of a csv file are names that it knows, or class ids.
        limit: tokens after which no new window is begun.

    Raises:
        ValueError: no such file or columns; while reading, a label that the model does not have.
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
        if not Path(path).is_file():
            raise ValueError(f"{path} is no file")
        self.path, self.max_length, self.batch_size, self.limit = path, max_length, batch_size, limit
        self.labelled = path.endswith(".csv")
        self.classes = classes_of(config) if self.labelled else {}
        self.tokenizer = copy.deepcopy(tokenizer)
        if tokenizer.pad_token is None:
            self.tokenizer.pad_token = tokenizer.eos_token
        if self.labelled:
            csv.field_size_limit(sys.maxsize)
            with open(path, encoding="utf-8", newline="") as file:
                columns = csv.DictReader(file).fieldnames or ["none"]
            if missing := {"text", "label"} - set(columns):
                raise ValueError(f"{path} has no column {', '.join(sorted(missing))}; it has {', '.join(columns)}")

    def rows(self) -> Iterator[tuple[str, int]]:
        """(text, class id); 0 without labels."""
        with open(self.path, encoding="utf-8", newline="") as file:
            if not self.labelled:
                yield from ((line.strip(), 0) for line in file if line.strip())
                return
            for number, row in enumerate(csv.DictReader(file), start=1):
                text, label = (row["text"] or "").strip(), (row["label"] or "").strip()
                if label not in self.classes:
                    known = ", ".join(self.classes)
                    raise ValueError(f"{self.path}, row {number}: label {label!r} is none of {known}")
                if text:
                    yield text, self.classes[label]

    def windows(self) -> Iterator[tuple[list[list[int]], list[int]]]:
        """Token ids and class ids of some texts at a time."""
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
