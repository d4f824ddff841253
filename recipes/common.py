"""What the recipes share: arguments from a YAML file and the command line, and labelled text."""

import atexit
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import real_inputs
import torch
import yaml
from datasets import ClassLabel, Dataset, DatasetDict, load_dataset
from transformers import (
    AutoTokenizer,
    HfArgumentParser,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    TrainingArguments,
)

from moefy_hf.evaluation.controls import BASELINES, CONTROLS
from moefy_hf.modeling.routers import ROUTERS
from moefy_hf.modeling.selection import SELECTIONS
from moefy_hf.splitters import SPLITTERS


@dataclass
class ModelArguments:
    """The dense model to start from."""

    model_name_or_path: str = field(metadata={"help": "Hub id, local directory, or package:NAME (see real_inputs.py)"})
    model_revision: str = field(default="main", metadata={"help": "branch, tag or commit on the Hub"})
    dtype: str = field(default="float32", metadata={"help": "dtype the weights are loaded in"})
    attn_implementation: str | None = field(default=None, metadata={"help": "attention implementation"})
    trust_remote_code: bool = field(default=False, metadata={"help": "run modeling code that comes with the model"})
    activation: str | None = field(
        default=None, metadata={"help": "swap the FFN activation for this one before training, e.g. relu"}
    )


@dataclass
class DataArguments:
    """Labelled text."""

    dataset_name: str = field(metadata={"help": "Hub id, local directory of csv/parquet files, or package:NAME"})
    dataset_config_name: str | None = field(default=None, metadata={"help": "configuration of a Hub dataset"})
    text_column: str = field(default="text", metadata={"help": "column with the text"})
    label_column: str = field(default="label", metadata={"help": "column with the label"})
    max_seq_length: int = field(default=128, metadata={"help": "longer texts are cut to so many tokens"})
    validation_split: str = field(default="validation", metadata={"help": "name of the validation split"})
    test_split: str = field(default="test", metadata={"help": "name of the test split"})


@dataclass
class MoeficationArguments:
    """The conversion and what is measured afterwards."""

    num_experts: int | None = field(default=None, metadata={"help": "experts per FFN; by default from expert_size"})
    expert_size: int = field(default=32, metadata={"help": "neurons per expert"})
    splitter: str = field(default="parameter_clustering", metadata={"help": ", ".join(SPLITTERS)})
    router: str = field(default="linear", metadata={"help": ", ".join(ROUTERS)})
    router_settings: list[str] | None = field(
        default=None,
        metadata={"help": "NAME=NUMBER: rank of low_rank, hidden of norm_regression, inputs of partial_input"},
    )
    shared_experts: int = field(
        default=0, metadata={"help": "experts that run for every token, made of the neurons that most tokens need"}
    )
    compensation: bool = field(
        default=False, metadata={"help": "experts that do not run contribute what they do on average when they do not"}
    )
    share: float = field(
        default=0.2, metadata={"help": "share of the experts a token computes, on average over layers"}
    )
    allocation: str = field(
        default="sensitivity",
        metadata={
            "help": "budget per layer: uniform, or more where it matters by a measure of it: "
            "sensitivity, angular (CFSP)"
        },
    )
    calibration_tokens: int = field(
        default=100_000, metadata={"help": "training tokens to profile and fit routers on"}
    )
    sparsity_penalty: str | None = field(
        default=None, metadata={"help": "in every training: square_hoyer, l1 or density"}
    )
    sparsity_weight: float = field(default=0.0, metadata={"help": "factor of that penalty"})
    shares: list[float] = field(default_factory=lambda: [0.05, 0.1, 0.2, 0.3], metadata={"help": "shares to sweep"})
    controls: list[str] = field(
        default_factory=lambda: ["oracle", "random"],
        metadata={"help": f"of {', '.join((*CONTROLS, *BASELINES))}; or none"},
    )
    selections: list[str] = field(
        default_factory=lambda: ["top_k"],
        metadata={"help": f"types of selection to sweep at the same average share: {', '.join(SELECTIONS)}"},
    )
    recovery_epochs: float = field(
        default=0.0, metadata={"help": "fine-tune the converted model for so many epochs, and the dense one beside it"}
    )
    recovery_parameters: str = field(
        default="all", metadata={"help": "what that trains: all, down (the paper's calibration), lora"}
    )
    lora_rank: int = field(default=16, metadata={"help": "rank of the LoRA on every Linear, merged afterwards"})
    distillation_weight: float = field(
        default=0.0, metadata={"help": "in recovery and schedule: weight of the divergence from the dense model"}
    )
    learned_eta: float | None = field(
        default=None,
        metadata={
            "help": "in recovery: learn how many experts each token needs (LTE), with this weight of the efficiency "
            "penalty, instead of a fixed budget; needs router sigmoid"
        },
    )
    learned_tau: float | None = field(
        default=None, metadata={"help": "with learned_eta: experts of at least this strength run; 0.5 by default"}
    )
    schedule: str | None = field(
        default=None,
        metadata={
            "help": "also MoEfy while training, from what the dense model began with and for as long: one_step, "
            "anneal, smoe_dropout or switchable"
        },
    )
    redo: bool = field(default=False, metadata={"help": "run finished stages again"})


def parse(types: tuple[type, ...], description: str, arguments: list[str] | None = None) -> list[Any]:
    """Dataclasses from `--config FILE.yaml` and the command line, which wins. Unknown names are errors in both."""
    atexit.register(leave_processes)
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    from_file: list[str] = []
    if any(
        issubclass(each, TrainingArguments) for each in types
    ):  # the first process converts and measures while the others wait for it
        from_file += ["--ddp_timeout", "21600"]
    while "--config" in arguments:
        at = arguments.index("--config")
        if at + 1 >= len(arguments):
            sys.exit("--config needs a YAML file")
        for name, value in yaml.safe_load(Path(arguments[at + 1]).read_text()).items():
            if value is not None:
                from_file += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
        del arguments[at : at + 2]
    if not torch.accelerator.is_available():
        from_file += ["--use_cpu", "true"]  # bf16 training on a CPU must be asked for
    parser = HfArgumentParser(
        types,
        description=description + "\n\n--config FILE.yaml sets any of these; the command line wins.",
        allow_abbrev=False,
    )
    return list(parser.parse_args_into_dataclasses(from_file + arguments))


def leave_processes() -> None:
    """gloo's threads drop their last tensors when they get Python's lock: a process that ends before can abort."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        time.sleep(1)


def load_splits(data: Any, splits: Iterable[str], columns: Iterable[str]) -> DatasetDict:
    """The dataset that arguments with `dataset_name` and `dataset_config_name` name.

    Raises:
        ValueError: it lacks one of the splits or columns; those that exist are named.
    """
    raw = load_dataset(real_inputs.resolve(data.dataset_name), data.dataset_config_name)
    for split in splits:
        if split not in raw:
            raise ValueError(f"{data.dataset_name} has no split {split!r}; it has {', '.join(raw)}")
        for column in columns:
            if column not in raw[split].column_names:
                raise ValueError(
                    f"split {split!r} of {data.dataset_name} has no column {column!r}; it has "
                    f"{', '.join(raw[split].column_names)}"
                )
    return raw


def load_texts(data: DataArguments, tokenizer: PreTrainedTokenizerBase) -> tuple[DatasetDict, list[str]]:
    """Tokenised train, validation and test splits with `labels`, and the names of the classes.

    Raises:
        ValueError: a split or column is missing, or a label is unknown; those that exist are named.
    """
    splits = {"train": "train", "validation": data.validation_split, "test": data.test_split}
    raw = load_splits(data, splits.values(), (data.text_column, data.label_column))
    feature = raw["train"].features[data.label_column]
    names = (
        feature.names if isinstance(feature, ClassLabel) else sorted(map(str, set(raw["train"][data.label_column])))
    )
    known = set(range(len(names))) if isinstance(feature, ClassLabel) else set(raw["train"][data.label_column])
    for split in splits.values():
        if unknown := set(raw[split][data.label_column]) - known:
            raise ValueError(
                f"split {split!r} of {data.dataset_name} has labels {', '.join(sorted(map(str, unknown)))}, "
                f"which are none of its classes: {', '.join(names)}"
            )
    index = {name: position for position, name in enumerate(names)}

    def encode(rows: dict[str, list]) -> dict[str, list]:
        encoded = tokenizer(rows[data.text_column], truncation=True, max_length=data.max_seq_length)
        labels = rows[data.label_column]
        if not isinstance(feature, ClassLabel):
            labels = [index[str(label)] for label in labels]
        return {**encoded, "labels": labels, "length": [len(ids) for ids in encoded["input_ids"]]}

    return DatasetDict(
        {
            ours: raw[theirs].map(
                encode, batched=True, remove_columns=raw[theirs].column_names, desc=f"tokenize {ours}"
            )
            for ours, theirs in splits.items()
        }
    ), names


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
        lengths = torch.tensor(rows["length"])
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


def load_tokenizer(model: Any) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(
        real_inputs.resolve(model.model_name_or_path),
        revision=model.model_revision,
        trust_remote_code=model.trust_remote_code,
    )


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


def override(config: PreTrainedConfig, changes: str) -> PreTrainedConfig:
    """Set what a text like "hidden_size=128,num_hidden_layers=3" says.

    Raises:
        ValueError: the config has no such setting.
    """
    for pair in filter(None, changes.split(",")):
        name, _, value = pair.partition("=")
        if not hasattr(config, name):
            raise ValueError(f"config_overrides: {type(config).__name__} has no setting {name!r}")
        setattr(config, name, int(value) if value.isdigit() else value)
    return config
