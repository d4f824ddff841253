"""Text and csv files as model-ready batches."""

import contextlib
import copy
import csv
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from .errors import MoefyError

IGNORED = -100  # a label that no loss counts
TABLES = (".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".parquet", ".arrow", ".xlsx")  # whose lines are not texts


class TextBatches:
    """Makes padded batches of texts in a seeded order; they can be read any number of times.

    Args:
        texts: the texts.
        tokenizer: of the model; it stays as it is.
        labels: one class id per text; or "next", for language models, whose labels are the tokens themselves.
        max_length: tokens of a text, at most.
        seed: of the order.
        batch_size: texts of a batch.
        decoder_start: for encoder-decoders: the token that their decoder reads first, before the tokens of the text.
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
        decoder_start: int | None = None,
    ):
        order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed)).tolist()
        self.batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
        self.texts, self.labels, self.max_length = texts, labels, max_length
        self.decoder_start = decoder_start
        self.tokenizer = copy.deepcopy(tokenizer)  # the caller's is saved as it came
        if tokenizer.pad_token is None:
            self.tokenizer.pad_token = tokenizer.eos_token

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        for indices in self.batches:
            texts = [self.texts[i] for i in indices]
            limits = {"truncation": True, "max_length": self.max_length, "padding": True, "padding_side": "right"}
            batch = dict(self.tokenizer(texts, return_tensors="pt", **limits))
            if self.decoder_start is not None:
                for name, first in (("input_ids", self.decoder_start), ("attention_mask", 1)):
                    start = torch.full_like(batch[name][:, :1], first)
                    batch[f"decoder_{name}"] = torch.cat([start, batch[name][:, :-1]], 1)
            if self.labels == "next":
                batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORED)
            elif self.labels is not None:
                batch["labels"] = torch.tensor([self.labels[i] for i in indices])
            yield batch


def decoder_start_of(model: PreTrainedModel) -> int | None:
    """Return the token that an encoder-decoder's decoder begins with; None for models that read texts as they are."""
    config = model.config
    if not config.is_encoder_decoder or model._get_name().endswith(("Classification", "Answering")):
        return None
    values = config.to_dict()
    starts = (values.get(f"{name}_token_id") for name in ("decoder_start", "bos", "pad"))
    return next((token for token in starts if token is not None), 0)


def longest_text(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_length: int) -> int:
    """Return the tokens of a text, at most: as many as asked for, or as model and tokenizer can take.

    Args:
        model: that reads the texts.
        tokenizer: of the model.
        max_length: as many as asked for.
    """
    limits = [max_length, tokenizer.model_max_length]
    if positions := getattr(model.config, "max_position_embeddings", None):
        limits.append(positions)
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            if module.padding_idx is not None:  # RoBERTa and its relatives count from behind the padding token's id
                limits.append(module.num_embeddings - module.padding_idx - 1)
    return min(limits)


@contextlib.contextmanager
def opened(path: str) -> Iterator[TextIO]:
    """Open a text file in UTF-8, with a byte order mark, as Excel writes it, or without.

    Raises:
        MoefyError: no such file, or, while it is read, one that is in another encoding or compressed.
    """
    if not Path(path).is_file():
        raise MoefyError(f"{path} is no file")
    with open(path, "rb") as raw:
        start = raw.read(4096)
    packed = start[:2] in (b"\x1f\x8b", b"PK", b"BZ", b"\xfd7", b"(\xb5")
    remedy = "unpack it first" if packed else "save it as UTF-8 (iconv -f latin1 -t utf-8, or -f utf-16)"
    if b"\0" in start:  # UTF-16 without a mark is valid UTF-8
        raise MoefyError(f"{path} is not UTF-8 text: {remedy}")
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            yield file
    except UnicodeDecodeError as error:
        raise MoefyError(f"{path} is not UTF-8 text: {remedy}") from error


def read_lines(path: str) -> list[str]:
    """Read the lines of a text file that are not blank.

    Raises:
        MoefyError: no such file, or no plain text, or nothing in it.
    """
    check_plain_text(path)
    with opened(path) as file:
        lines = [line.strip() for line in file.read().splitlines()]
    lines = [line for line in lines if line]
    if not lines:
        raise MoefyError(f"{path} holds no text")
    return lines


def read_texts(path: str) -> list[str]:
    """Read the texts of a csv file's column `text`, or the lines of a text file; blank ones are left out.

    Raises:
        MoefyError: no such file or column, a table of another kind, or no text in it.
    """
    if Path(path).suffix.lower() != ".csv":
        return read_lines(path)
    texts = [(row["text"] or "").strip() for row in csv_rows(path, {"text"})]
    texts = [text for text in texts if text]
    if not texts:
        raise MoefyError(f"{path} holds no text")
    return texts


def csv_rows(path: str, columns: set[str]) -> Iterator[dict[str, str | None]]:
    """Read the rows of a csv file.

    Raises:
        MoefyError: no such file, or it lacks one of the columns.
    """
    csv.field_size_limit(sys.maxsize)  # a text may be long
    with opened(path) as file:
        rows = csv.DictReader(file)
        if missing := columns - set(rows.fieldnames or ()):
            has = ", ".join(rows.fieldnames or ["none"])
            raise MoefyError(f"{path} has no column {', '.join(sorted(missing))}; it has {has}")
        yield from rows


def check_plain_text(path: str) -> None:
    """Check that a file which is read line by line is not a table, whose lines would be rows.

    Raises:
        MoefyError: its name is that of a table.
    """
    kind = Path(path).suffix.lower()
    if kind in TABLES:
        raise MoefyError(
            f"{path} is a {kind} file; texts are read from plain text with one text per line, or from the column text "
            "of a .csv file"
        )


def read_labelled(path: str, config: PreTrainedConfig) -> tuple[list[str], list[int]]:
    """Read the columns `text` and `label` of a csv file; return texts and class ids.

    Args:
        path: of the file.
        config: of the model, which knows the classes.

    Raises:
        MoefyError: see `labelled_rows`; or a row has no text, or there is no row.
    """
    rows = list(labelled_rows(path, config))
    if not rows:
        raise MoefyError(f"{path} holds no rows")
    for line, (text, _) in enumerate(rows, start=1):
        if not text:
            raise MoefyError(f"{path}: row {line} has no text")
    return [text for text, _ in rows], [label for _, label in rows]


def labelled_rows(path: str, config: PreTrainedConfig) -> Iterator[tuple[str, int]]:
    """Read (text, class id) of each row of a csv file with columns `text` and `label`.

    Args:
        path: of the file.
        config: of the model; labels are names of its classes, or class ids.

    Raises:
        MoefyError: no such file or columns; or, at its row, no label, or one that the model does not have.
    """
    classes = classes_of(config)
    for line, row in enumerate(csv_rows(path, {"text", "label"}), start=1):
        label = (row["label"] or "").strip()
        if not label:
            raise MoefyError(f"{path}: row {line} has no label")
        if label not in classes:
            known = ", ".join(map(str, (config.id2label or {}).values()))
            raise MoefyError(f"{path}: row {line} has label {label!r}, which is none of {known}")
        yield (row["text"] or "").strip(), classes[label]


def split_off(texts: list[str]) -> tuple[list[str], list[str]]:
    """Hold out every twentieth text, or 64 of more; return the texts to fit on, and those to check quality on.

    Nothing is held out of a single text.
    """
    if len(texts) == 1:
        return texts, []
    step = max(20, len(texts) // 64)
    return [text for i, text in enumerate(texts) if i % step], texts[::step]


def classes_of(config: PreTrainedConfig) -> dict[str, int]:
    """Return what a file may call a class -> its id: the id itself, or the name that a model's config has for it."""
    names = {int(i): str(name) for i, name in (config.id2label or {}).items()}
    return {str(i): i for i in names} | {name: i for i, name in names.items()}
