"""Text files as model-ready batches, for the command line."""

import copy
import csv
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

IGNORED = -100


class TextBatches:
    """Texts as padded batches in a seeded order; can be read any number of times.

    Args:
        labels: one class id per text; or "next", for language models, whose labels are the tokens themselves.
    """

    def __init__(
        self,
        texts: list[str],
        tokenizer: PreTrainedTokenizerBase,
        *,
        labels: list[int] | str | None = None,
        max_length: int = 256,
        seed: int = 0,
        batch_size: int = 16,
    ):
        order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed)).tolist()
        self.parts = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
        self.texts, self.labels, self.max_length = texts, labels, max_length
        self.tokenizer = copy.deepcopy(tokenizer)  # the caller's is saved as it came
        if tokenizer.pad_token is None:
            self.tokenizer.pad_token = tokenizer.eos_token

    def __len__(self) -> int:
        return len(self.parts)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        for part in self.parts:
            texts = [self.texts[i] for i in part]
            limits = {"truncation": True, "max_length": self.max_length, "padding": True, "padding_side": "right"}
            batch = dict(self.tokenizer(texts, return_tensors="pt", **limits))
            if self.labels == "next":
                batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORED)
            elif self.labels is not None:
                batch["labels"] = torch.tensor([self.labels[i] for i in part])
            yield batch


def read_lines(path: str) -> list[str]:
    """The lines of a text file that are not blank.

    Raises:
        ValueError: there is no such file, or nothing in it.
    """
    if not Path(path).is_file():
        raise ValueError(f"{path} is no text file")
    lines = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines()]
    lines = [line for line in lines if line]
    if not lines:
        raise ValueError(f"{path} holds no text")
    return lines


def read_labelled(path: str, config: PreTrainedConfig) -> tuple[list[str], list[int]]:
    """Columns `text` and `label` of a csv file; labels are names that the model's config knows, or else class ids.

    Raises:
        ValueError: no such file or columns, or a label that the model does not have; the known ones are named.
    """
    if not Path(path).is_file():
        raise ValueError(f"{path} is no csv file")
    csv.field_size_limit(sys.maxsize)  # a text may be long
    with open(path, encoding="utf-8", newline="") as file:
        rows = csv.DictReader(file)
        missing = {"text", "label"} - set(rows.fieldnames or ())
        if missing:
            raise ValueError(
                f"{path} has no column {', '.join(sorted(missing))}; it has {', '.join(rows.fieldnames or ['none'])}"
            )
        found = [((row["text"] or "").strip(), (row["label"] or "").strip()) for row in rows]
    if not found:
        raise ValueError(f"{path} holds no rows")
    classes = classes_of(config)
    for line, (text, label) in enumerate(found, start=1):
        if not text:
            raise ValueError(f"{path}: row {line} has no text")
        if label not in classes:
            raise ValueError(f"{path}: label {label!r} is none of {', '.join(map(str, config.id2label.values()))}")
    return [text for text, _ in found], [classes[label] for _, label in found]


def split_off(texts: list[str]) -> tuple[list[str], list[str]]:
    """(those to fit on, those to predict quality on): every twentieth, or 64 of more; none of a single text."""
    if len(texts) == 1:
        return texts, []
    step = max(20, len(texts) // 64)
    return [text for i, text in enumerate(texts) if i % step], texts[::step]


def classes_of(config: PreTrainedConfig) -> dict[str, int]:
    """How a file may call each class: by its id, or the name that a model's config has for it."""
    names = {int(i): str(name) for i, name in (config.id2label or {}).items()}
    return {str(i): i for i in names} | {name: i for i, name in names.items()}
