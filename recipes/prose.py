"""Texts as blocks of tokens for language models: tokenised, joined, and cut into equal parts."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import real_inputs
import torch
from datasets import Dataset, DatasetDict, IterableDataset, concatenate_datasets, load_dataset
from transformers import PreTrainedTokenizerBase

KEPT = 8  # blocks of the training texts that nothing is fitted on


@dataclass
class ProseArguments:
    """Texts to calibrate and train on, and others to measure on."""

    dataset_name: list[str] = field(
        metadata={"help": "Hub ids, local .txt files, directories of .txt, csv or parquet files, or package:NAME"}
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "configuration of a Hub dataset"})
    text_column: str = field(default="text", metadata={"help": "column with the text"})
    train_split: str = field(default="train", metadata={"help": "name of the training split"})
    held_out_name: list[str] = field(
        default_factory=list, metadata={"help": "texts to measure on, like dataset_name; by default its other splits"}
    )
    held_out_splits: list[str] = field(
        default_factory=lambda: ["validation", "test"],
        metadata={"help": "splits of the first dataset_name to measure on, where there is no held_out_name"},
    )
    streaming: bool = field(default=False, metadata={"help": "read no more of the texts than is used"})
    max_seq_length: int = field(default=512, metadata={"help": "tokens of a block"})
    train_tokens: int = field(
        default=500_000, metadata={"help": "tokens of the training texts; recovery_epochs are passes over them"}
    )
    held_out_tokens: int = field(default=4096, metadata={"help": "tokens of each text to measure on"})
    generated_rows: int = field(default=4, metadata={"help": "beginnings of held-out blocks that are continued"})
    generated_tokens: int = field(default=40, metadata={"help": "tokens of a continuation, and of its beginning"})


def load_prose(data: ProseArguments, tokenizer: PreTrainedTokenizerBase, seed: int) -> DatasetDict:
    """Blocks with `input_ids`: "train", "validation" (of the same texts), and each held-out text under its name.

    Raises:
        ValueError: a number out of range, a missing split or column (what there is is named), or too little text.
    """
    for name in ("max_seq_length", "train_tokens", "held_out_tokens", "generated_tokens"):
        if getattr(data, name) < 2:
            raise ValueError(f"{name} must be at least 2, got {getattr(data, name)}")
    count = data.train_tokens // data.max_seq_length + KEPT
    train = blocks(data, data.dataset_name, data.train_split, tokenizer, count, seed)
    if len(train) < 2 * KEPT:
        raise ValueError(
            f"{' and '.join(data.dataset_name)}: {len(train)} blocks of {data.max_seq_length} tokens within "
            f"train_tokens={data.train_tokens} are too few, at least {2 * KEPT} are needed"
        )
    found = {"train": train.select(range(KEPT, len(train))), "validation": train.select(range(KEPT))}
    places = [([name], "train") for name in data.held_out_name]
    places = places or [(data.dataset_name[:1], split) for split in data.held_out_splits]
    for names, split in places:
        key = short(names[0]) if data.held_out_name else f"{short(names[0])}-{split}"
        if key in found:
            raise ValueError(f"held-out texts need names of their own, and {key!r} is taken")
        found[key] = blocks(data, names, split, tokenizer, max(1, data.held_out_tokens // data.max_seq_length), 0)
        if not len(found[key]):
            raise ValueError(f"{names[0]}, {split}, has no block of {data.max_seq_length} tokens to measure on")
    return DatasetDict(found)


def short(name: str) -> str:
    return Path(name.removeprefix(real_inputs.PREFIX)).stem


def blocks(
    data: ProseArguments, names: Sequence[str], split: str, tokenizer: PreTrainedTokenizerBase, count: int, seed: int
) -> Dataset:
    """At most `count` blocks, drawn at random; of a stream the first of shuffled texts, as many of each name."""
    found = []
    for name in names:
        packed = pack(load_texts(data, name, split), data.text_column, tokenizer, data.max_seq_length, seed)
        if isinstance(packed, IterableDataset):
            part = [row["input_ids"] for row in packed.take(-(-count // len(names)))]
            packed = Dataset.from_dict({"input_ids": part})
        found.append(packed)
    whole = concatenate_datasets(found)
    return whole.shuffle(seed=seed).select(range(min(count, len(whole))))


def load_texts(data: ProseArguments, name: str, split: str) -> Dataset | IterableDataset:
    """One data set's split; each .txt file is one text."""
    path = Path(real_inputs.resolve(name))
    files = sorted(map(str, path.glob("*.txt"))) if path.is_dir() else [str(path)] if path.suffix == ".txt" else []
    if files:
        raw: Any = load_dataset("text", data_files=files, sample_by="document", streaming=data.streaming)
    else:
        raw = load_dataset(str(path), data.dataset_config_name, streaming=data.streaming)
    if split not in raw:
        raise ValueError(f"{name} has no split {split!r}; it has {', '.join(raw)}")
    columns = raw[split].column_names or list(next(iter(raw[split])))
    if data.text_column not in columns:
        raise ValueError(f"split {split!r} of {name} has no column {data.text_column!r}; it has {', '.join(columns)}")
    return raw[split].select_columns([data.text_column])


def pack(texts: Any, column: str, tokenizer: PreTrainedTokenizerBase, length: int, seed: int) -> Any:
    """Texts one after the other, each with the end-of-text token, cut into blocks; what is left over is dropped."""

    def encode(rows: dict[str, list]) -> dict[str, list]:
        ids: list[int] = []
        for text in tokenizer(rows[column])["input_ids"]:
            ends = tokenizer.eos_token_id is None or text[-1:] == [tokenizer.eos_token_id]
            ids += text if ends else [*text, tokenizer.eos_token_id]
        return {"input_ids": [ids[start : start + length] for start in range(0, len(ids) - length + 1, length)]}

    settings = {"batched": True, "remove_columns": [column]}
    if isinstance(texts, IterableDataset):
        return texts.shuffle(seed=seed, buffer_size=1000).map(encode, **settings)
    return texts.map(encode, **settings, desc="tokenize and pack")


def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """(B, length): every token is to be predicted from those before it."""
    ids = torch.tensor([row["input_ids"] for row in rows])
    return {"input_ids": ids, "labels": ids.clone()}
