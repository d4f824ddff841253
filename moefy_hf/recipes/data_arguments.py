"""Arguments that name data, as dataclasses, and what arguments of the recipes are made with."""

from dataclasses import dataclass, field
from typing import ClassVar

DATASET = "Hub id, local directory of csv, jsonl or parquet files, or package:NAME"


def about(help: str, default):
    """Make a field with a help text; lists are copied for each instance."""
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": help})
    return field(default=default, metadata={"help": help})


def needed(help: str):
    """Make a field without a default."""
    return field(metadata={"help": help})


class Group:
    """Settings that `--help` shows together, under the first line of their class' docstring."""

    _argument_group_name: ClassVar[str]  # which HfArgumentParser reads

    def __init_subclass__(cls) -> None:
        cls._argument_group_name = (cls.__doc__ or cls.__name__).partition("\n")[0].rstrip(".")


@dataclass
class DatasetArguments(Group):
    """A data set with splits."""

    dataset_name: str = needed(DATASET)
    dataset_config_name: str | None = about("configuration of a Hub dataset", None)
    validation_split: str = about("name of the validation split", "validation")
    test_split: str = about("name of the test split", "test")


@dataclass
class TokenisedArguments(DatasetArguments):
    """A data set of texts, or so many rows of it."""

    max_seq_length: int = about("longer texts are cut to so many tokens", 128)
    max_train_samples: int | None = about("train on so many rows (seeded)", None)
    max_eval_samples: int | None = about("measure on so many rows of validation and test each (seeded)", None)


@dataclass
class TextDataArguments(TokenisedArguments):
    """Labelled text."""

    text_column: str = about("column with the text", "text")
    label_column: str = about("column with the label", "label")


@dataclass
class TokenDataArguments(TokenisedArguments):
    """Texts with a tag for each word, in columns or in the files of CoNLL."""

    dataset_name: str = needed(
        f"{DATASET}; or directory of train.txt, validation.txt, ...: a word and its tag in a line"
    )
    tokens_column: str = about("column with the words, a list or a text with spaces", "tokens")
    tags_column: str = about("column with their tags", "tags")


@dataclass
class QuestionDataArguments(TokenisedArguments):
    """Questions whose answers are spans of a text, as in SQuAD."""

    dataset_name: str = needed(f"{DATASET}; or directory of SQuAD's json files")
    context_column: str = about("column with the text", "context")
    question_column: str = about("column with the question", "question")
    answers_column: str = about(
        "column with the answers, {text: [...], answer_start: [...]}; none if empty", "answers"
    )
    max_seq_length: int = about("tokens of a question with a window of the text", 384)
    doc_stride: int = about("tokens that neighbouring windows share", 128)
    max_answer_length: int = about("longer spans, in tokens, are no answers", 30)


@dataclass
class PairDataArguments(DatasetArguments):
    """Pairs of texts."""

    source_column: str = about("column with the input", "text")
    target_column: str = about("column with the output, text", "label")
    source_prefix: str = about("put before every input", "")
    max_source_length: int = about("longer inputs are cut to so many tokens", 64)
    max_target_length: int = about("longer outputs are cut to so many tokens", 16)


@dataclass
class ImageDataArguments(DatasetArguments):
    """Labelled images."""

    image_column: str = about("column with the image", "image")
    label_column: str = about("column with the label, a ClassLabel", "label")
    validation_split: str = about("name of the validation split; a tenth of train where there is none", "validation")
    max_train_samples: int | None = about("train on so many rows (seeded)", None)


@dataclass
class ProseDataArguments(Group):
    """Texts to calibrate and train on."""

    dataset_name: list[str] = needed("Hub ids, local .txt files, directories of .txt, csv or parquet, or package:NAME")
    dataset_config_name: str | None = about("configuration of a Hub dataset", None)
    text_column: str = about("column with the text", "text")
    train_split: str = about("name of the training split", "train")
    streaming: bool = about("read no more of the texts than is used", False)
    max_seq_length: int = about("tokens of a block", 512)
    train_tokens: int = about("tokens of the training texts; recovery_epochs are passes over them", 500_000)


@dataclass
class HeldOutArguments(Group):
    """Texts to measure on."""

    held_out_name: list[str] = about("like dataset_name, or none; by default the other splits of dataset_name", [])
    held_out_splits: list[str] = about(
        "splits of the first dataset_name to measure on, where there is no held_out_name", ["validation", "test"]
    )
    held_out_tokens: int = about("tokens of each text to measure on", 4096)
