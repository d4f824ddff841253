"""Data of the recipes: labelled text, pairs of texts and images, and batches of them."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from datasets import ClassLabel, Dataset, DatasetDict, load_dataset
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from ..errors import MoefyError
from .arguments import ImageDataArguments, PairDataArguments, TextDataArguments
from .inputs import resolve


def load_splits(
    data: Any, splits: Iterable[str], columns: Iterable[str], raw: DatasetDict | None = None
) -> DatasetDict:
    """Load the dataset that arguments with `dataset_name` and `dataset_config_name` name.

    Args:
        data: the arguments.
        splits: names of those that are needed.
        columns: names of those that each split needs.
        raw: the dataset, where it has been read already.

    Raises:
        MoefyError: it lacks one of the splits or columns; those that exist are named.
    """
    raw = raw or load_dataset(resolve(data.dataset_name), data.dataset_config_name)
    for split in splits:
        if split not in raw:
            raise MoefyError(f"{data.dataset_name} has no split {split!r}; it has {', '.join(raw)}")
        for column in columns:
            if column not in raw[split].column_names:
                raise MoefyError(
                    f"split {split!r} of {data.dataset_name} has no column {column!r}; it has "
                    f"{', '.join(raw[split].column_names)}"
                )
    return raw


def load_texts(data: TextDataArguments, tokenizer: PreTrainedTokenizerBase) -> tuple[DatasetDict, list[str]]:
    """Return tokenised train, validation and test splits with `labels`, and the names of the classes.

    Raises:
        MoefyError: a split or column is missing, or a label is unknown; those that exist are named.
    """
    splits = {"train": "train", "validation": data.validation_split, "test": data.test_split}
    raw = load_splits(data, splits.values(), (data.text_column, data.label_column))
    feature = raw["train"].features[data.label_column]
    named = isinstance(feature, ClassLabel)
    names = feature.names if named else sorted(map(str, set(raw["train"][data.label_column])))
    known = set(range(len(names))) if named else set(raw["train"][data.label_column])
    for split in splits.values():
        if unknown := set(raw[split][data.label_column]) - known:
            raise MoefyError(
                f"split {split!r} of {data.dataset_name} has labels {', '.join(sorted(map(str, unknown)))}, "
                f"which are none of its classes: {', '.join(names)}"
            )
    index = {name: position for position, name in enumerate(names)}
    for use, split in splits.items():
        raw[split] = sampled(raw[split], data.max_train_samples if use == "train" else data.max_eval_samples)

    def encode(rows: dict[str, list]) -> dict[str, list]:
        encoded = tokenizer(rows[data.text_column], truncation=True, max_length=data.max_seq_length)
        labels = rows[data.label_column]
        if not named:
            labels = [index[str(label)] for label in labels]
        return {**encoded, "labels": labels, "length": [len(ids) for ids in encoded["input_ids"]]}

    return encoded_splits(raw, splits, encode), names


def load_pairs(data: PairDataArguments, tokenizer: PreTrainedTokenizerBase) -> DatasetDict:
    """Return tokenised train, validation and test splits with `labels`.

    Raises:
        MoefyError: a split or column is missing, or targets are no text; what there is is named.
    """
    splits = {"train": "train", "validation": data.validation_split, "test": data.test_split}
    raw = load_splits(data, splits.values(), (data.source_column, data.target_column))
    if not isinstance(raw["train"][0][data.target_column], str):
        raise MoefyError(f"column {data.target_column!r} of {data.dataset_name} is no text")

    def encode(rows: dict[str, list]) -> dict[str, list]:
        sources = [data.source_prefix + text for text in rows[data.source_column]]
        encoded = tokenizer(sources, truncation=True, max_length=data.max_source_length)
        targets = tokenizer(text_target=rows[data.target_column], truncation=True, max_length=data.max_target_length)
        return {
            "input_ids": encoded["input_ids"],
            "attention_mask": encoded["attention_mask"],
            "labels": targets["input_ids"],
        }

    return encoded_splits(raw, splits, encode)


def load_images(data: ImageDataArguments) -> tuple[DatasetDict, list[str]]:
    """Return train, validation and test splits, and the names of the classes.

    Raises:
        MoefyError: a split or column is missing, or labels are not classes; what there is is named.
    """
    raw = load_splits(data, ("train", data.test_split), (data.image_column, data.label_column))
    feature = raw["train"].features[data.label_column]
    if not isinstance(feature, ClassLabel):
        raise MoefyError(f"column {data.label_column!r} of {data.dataset_name} is no ClassLabel but {feature}")
    train = raw["train"]
    if data.validation_split in raw:
        validation = raw[data.validation_split]
    else:
        parts = train.train_test_split(test_size=0.1, seed=0, stratify_by_column=data.label_column)
        train, validation = parts["train"], parts["test"]
    train = sampled(train, data.max_train_samples)
    return DatasetDict(train=train, validation=validation, test=raw[data.test_split]), feature.names


def sampled(rows: Dataset, count: int | None) -> Dataset:
    """Return so many rows, drawn at random."""
    return rows if count is None else rows.shuffle(seed=0).select(range(min(count, len(rows))))


def encoded_splits(raw: DatasetDict, splits: Mapping[str, str], encode: Callable[[dict], dict]) -> DatasetDict:
    """Tokenise splits, and give them the names of their use."""
    return DatasetDict(
        {
            use: raw[split].map(encode, batched=True, remove_columns=raw[split].column_names, desc=f"tokenize {use}")
            for use, split in splits.items()
        }
    )


class Batches:
    """A dataset as padded, model-ready batches of rows of similar length; can be read any number of times.

    Args:
        shuffle: mix rows and batches with `seed`, so that any first part is a fair sample; otherwise shortest first.
    """

    WINDOW = 32  # batches among which rows are sorted by length when shuffling

    def __init__(
        self,
        rows: Dataset,
        tokenizer: PreTrainedTokenizerBase,
        batch_size: int = 64,
        shuffle: bool = False,
        seed: int = 0,
    ):
        self.rows, self.tokenizer = rows, tokenizer
        lengths = torch.tensor(rows["length"][:])  # at once: a column by itself is read row by row
        order = torch.arange(len(rows))
        generator = torch.Generator().manual_seed(seed)
        window = len(rows)
        if shuffle:
            order, window = torch.randperm(len(rows), generator=generator), self.WINDOW * batch_size
        self.batches = [
            batch
            for part in order.split(max(window, 1))
            for batch in part[lengths[part].argsort(stable=True)].split(batch_size)
        ]
        if shuffle:
            self.batches = [self.batches[i] for i in torch.randperm(len(self.batches), generator=generator)]

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        for batch in self.batches:
            rows = self.rows[batch.tolist()]
            rows.pop("length")
            labels = torch.tensor(rows.pop("labels"))
            yield {**self.tokenizer.pad(rows, return_tensors="pt"), "labels": labels}


class CollatedBatches:
    """A dataset as the model-ready batches that a collator makes of its rows; can be read any number of times."""

    def __init__(
        self,
        rows: Dataset,
        collator: Callable[[list[dict[str, Any]]], Mapping[str, torch.Tensor]],
        batch_size: int = 64,
        shuffle: bool = False,
        seed: int = 0,
    ):
        self.rows, self.collator = rows, collator
        order = torch.arange(len(rows))
        if shuffle:
            order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
        self.batches = order.split(batch_size)

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        for batch in self.batches:
            yield dict(self.collator([self.rows[i] for i in batch.tolist()]))


def load_tokenizer(model: Any) -> PreTrainedTokenizerBase:
    """Load the tokenizer of the model that arguments name."""
    return AutoTokenizer.from_pretrained(
        resolve(model.model_name_or_path),
        revision=model.model_revision,
        trust_remote_code=model.trust_remote_code,
    )


def override(config: PreTrainedConfig, changes: str) -> PreTrainedConfig:
    """Set what a text like "hidden_size=128,num_hidden_layers=3" says.

    Raises:
        MoefyError: the config has no such setting.
    """
    for pair in filter(None, changes.split(",")):
        name, _, value = pair.partition("=")
        if not hasattr(config, name):
            raise MoefyError(f"config_overrides: {type(config).__name__} has no setting {name!r}")
        setattr(config, name, int(value) if value.isdigit() else value)
    return config
