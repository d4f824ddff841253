"""Text files as model-ready batches, for the command line."""

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

IGNORED = -100
TABLES = (".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".parquet", ".arrow", ".xlsx")  # no text with a line each


class TextBatches:
    """Texts as padded batches in a seeded order; can be read any number of times.

    Args:
        labels: one class id per text; or "next", for language models, whose labels are the tokens themselves.
        decoder_start: for encoder-decoders, which read each text with their decoder, too, shifted by this token.
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
        self.parts = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
        self.texts, self.labels, self.max_length = texts, labels, max_length
        self.decoder_start = decoder_start
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
            if self.decoder_start is not None:
                for name, first in (("input_ids", self.decoder_start), ("attention_mask", 1)):
                    start = torch.full_like(batch[name][:, :1], first)
                    batch[f"decoder_{name}"] = torch.cat([start, batch[name][:, :-1]], 1)
            if self.labels == "next":
                batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORED)
            elif self.labels is not None:
                batch["labels"] = torch.tensor([self.labels[i] for i in part])
            yield batch


def decoder_start_of(model: PreTrainedModel) -> int | None:
    """The token that an encoder-decoder's decoder begins with; None for models that read texts as they are."""
    config = model.config
    if not config.is_encoder_decoder or model._get_name().endswith(("Classification", "Answering")):
        return None
    known = config.to_dict()
    starts = (known.get(f"{name}_token_id") for name in ("decoder_start", "bos", "pad"))
    return next((token for token in starts if token is not None), 0)


def longest_text(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, wanted: int) -> int:
    """Tokens of a text: as many as asked for, or as model and tokenizer can take."""
    known = [wanted, tokenizer.model_max_length]
    if positions := getattr(model.config, "max_position_embeddings", None):
        known.append(positions)
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            if module.padding_idx is not None:  # RoBERTa and its relatives count from behind the padding token's id
                known.append(module.num_embeddings - module.padding_idx - 1)
    return min(known)


@contextlib.contextmanager
def opened(path: str) -> Iterator[TextIO]:
    """A text file in UTF-8, with a byte order mark, as Excel writes it, or without.

    Raises:
        ValueError: no such file, or, while it is read, one that is in another encoding or compressed.
    """
    if not Path(path).is_file():
        raise ValueError(f"{path} is no file")
    with open(path, "rb") as raw:
        start = raw.read(4096)
    packed = start[:2] in (b"\x1f\x8b", b"PK", b"BZ", b"\xfd7", b"(\xb5")
    remedy = "unpack it first" if packed else "save it as UTF-8 (iconv -f latin1 -t utf-8, or -f utf-16)"
    if b"\0" in start:  # UTF-16 without a mark is valid UTF-8
        raise ValueError(f"{path} is not UTF-8 text: {remedy}")
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            yield file
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {remedy}") from error


def read_lines(path: str) -> list[str]:
    """The lines of a text file that are not blank.

    Raises:
        ValueError: no such file, or no plain text, or nothing in it.
    """
    check_plain_text(path)
    with opened(path) as file:
        lines = [line.strip() for line in file.read().splitlines()]
    lines = [line for line in lines if line]
    if not lines:
        raise ValueError(f"{path} holds no text")
    return lines


def read_texts(path: str) -> list[str]:
    """Read the texts of a csv file's column `text`, or the lines of a text file; blank ones are left out.

    Raises:
        ValueError: no such file or column, a table of another kind, or no text in it.
    """
    if Path(path).suffix.lower() != ".csv":
        return read_lines(path)
    texts = [(row["text"] or "").strip() for row in csv_rows(path, {"text"})]
    texts = [text for text in texts if text]
    if not texts:
        raise ValueError(f"{path} holds no text")
    return texts


def csv_rows(path: str, columns: set[str]) -> Iterator[dict[str, str | None]]:
    """Read the rows of a csv file.

    Raises:
        ValueError: no such file, or it lacks one of the columns.
    """
    csv.field_size_limit(sys.maxsize)  # a text may be long
    with opened(path) as file:
        rows = csv.DictReader(file)
        if missing := columns - set(rows.fieldnames or ()):
            has = ", ".join(rows.fieldnames or ["none"])
            raise ValueError(f"{path} has no column {', '.join(sorted(missing))}; it has {has}")
        yield from rows


def check_plain_text(path: str) -> None:
    """
    Raises:
        ValueError: a table is given as plain text, whose lines would be its rows as they are written.
    """
    kind = Path(path).suffix.lower()
    if kind in TABLES:
        raise ValueError(
            f"{path} is a {kind} file; texts are read from plain text with one text per line, or from the column text "
            "of a .csv file"
        )


def read_labelled(path: str, config: PreTrainedConfig) -> tuple[list[str], list[int]]:
    """Columns `text` and `label` of a csv file, see `labelled_rows`.

    Raises:
        ValueError: see `labelled_rows`; or a row has no text, or there is no row.
    """
    found = list(labelled_rows(path, config))
    if not found:
        raise ValueError(f"{path} holds no rows")
    for line, (text, _) in enumerate(found, start=1):
        if not text:
            raise ValueError(f"{path}: row {line} has no text")
    return [text for text, _ in found], [label for _, label in found]


def labelled_rows(path: str, config: PreTrainedConfig) -> Iterator[tuple[str, int]]:
    """(text, class id) of each row of a csv file with columns `text` and `label`; labels are names that the model's
    config knows, or else class ids.

    Raises:
        ValueError: no such file or columns; or, at its row, no label, or one that the model does not have.
    """
    classes = classes_of(config)
    for line, row in enumerate(csv_rows(path, {"text", "label"}), start=1):
        label = (row["label"] or "").strip()
        if not label:
            raise ValueError(f"{path}: row {line} has no label")
        if label not in classes:
            known = ", ".join(map(str, config.id2label.values()))
            raise ValueError(f"{path}: row {line} has label {label!r}, which is none of {known}")
        yield (row["text"] or "").strip(), classes[label]


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
