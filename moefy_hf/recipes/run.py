"""A run of a recipe: what its stages share."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, DatasetDict, concatenate_datasets
from transformers import EvalPrediction, PreTrainedModel, Trainer, TrainingArguments

from ..config import MoEficationConfig
from .arguments import EvaluationArguments
from .data import Batches, CollatedBatches
from .given import GIVEN, fetch_given
from .inputs import public
from .plans import DENSE
from .scores import Metrics
from .settings import Arguments
from .stages import Stages

Batch = dict[str, torch.Tensor]


@dataclass
class Run:
    """What the stages of a recipe share.

    Attributes:
        splits: train, validation and test, with `labels`; `names` are those of the classes.
        processor: tokenizer or image processor, saved beside every model.
        auto: the AutoModel class that loads the models.
        metrics: of the library evaluate, which judge what `predict` makes of a model: predictions and references.
        collator: makes batches of rows, the Trainer's too; None where texts are padded, and for the Trainer's own.
        batch_size: rows of a batch that is measured or calibrated on.
        task_type: peft's name of the task; None for those it has none for.
        trainer: the Trainer class, and `compute_metrics` what it computes from predictions and labels.
    """

    arguments: Arguments
    stages: Stages
    splits: DatasetDict
    names: list[str]
    processor: Any
    auto: Any
    metrics: Metrics
    predict: Callable[["Run", PreTrainedModel], tuple[Sequence, Sequence]] | None = None
    collator: Callable | None = None
    batch_size: int = 64
    task_type: str | None = None
    trainer: type[Trainer] = Trainer
    compute_metrics: Callable[[EvalPrediction], dict[str, float]] | None = None

    @property
    def training(self) -> TrainingArguments:
        """How the dense model is trained."""
        return self.arguments[TrainingArguments]

    @property
    def evaluation(self) -> EvaluationArguments:
        """What is measured of every MoEfied model."""
        return self.arguments[EvaluationArguments]

    @property
    def config(self) -> MoEficationConfig:
        """How the dense model is converted."""
        return self.arguments[MoEficationConfig]

    @property
    def writes(self) -> bool:
        """Whether this is the process that converts, measures and saves."""
        return self.training.should_save

    @property
    def folder(self) -> Path:
        """Where the results are."""
        return self.stages.directory

    def wait(self) -> None:
        """Let processes go on together."""
        self.training.distributed_state.wait_for_everyone()

    def autocast(self) -> torch.autocast:
        """Return the precision of training as a context."""
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.training.mixed_precision)
        return torch.autocast(self.training.device.type, dtype, enabled=dtype is not None)

    def place(self, name: str) -> str | Path:
        """Return where a model of this run is, by its name."""
        return self.arguments.recovers if self.arguments.recovers and name in GIVEN else self.folder / name

    def fetch(self, name: str) -> PreTrainedModel:
        """Load a model of this run by its name."""
        if self.arguments.recovers and name in GIVEN:
            return fetch_given(self, name)
        return self.auto.from_pretrained(self.folder / name, trust_remote_code=name not in DENSE)

    def load(self, name: str) -> PreTrainedModel:
        """Load a model of this run by its name, on the device that trains."""
        model: Any = self.fetch(name)
        return model.to(self.training.device)

    def labels(self) -> dict[str, Any]:
        """Return what a model's config says of its classes."""
        return {
            "num_labels": len(self.names),
            "id2label": dict(enumerate(self.names)),
            "label2id": {name: position for position, name in enumerate(self.names)},
        }

    def batches(self, rows: Dataset, shuffle: bool, seed: int) -> Iterable[Batch]:
        """Return rows as model-ready batches that can be read any number of times."""
        if self.collator is None:
            return Batches(rows, self.processor, self.batch_size, shuffle, seed)
        return CollatedBatches(rows, self.collator, self.batch_size, shuffle, seed)

    def calibration(self) -> Iterable[Batch]:
        """Return the training rows as shuffled batches."""
        return self.batches(self.splits["train"], True, self.config.seed)

    def validation(self) -> Iterable[Batch]:
        """Return the validation rows as shuffled batches."""
        return self.batches(self.splits["validation"], True, 0)

    def measured_on(self) -> dict[str, str]:
        """Return name and split of what `held_out` reads."""
        data = self.arguments.data
        splits = dict.fromkeys((data.validation_split, data.test_split))
        return {"data": public(data.dataset_name), "split": " and ".join(splits)}

    def held_out(self, rows: int | None = None) -> Iterable[Batch]:
        """Return validation and test together as batches, or so many of their rows."""
        both = concatenate_datasets([self.splits["validation"], self.splits["test"]])
        if rows is not None:
            both = both.shuffle(seed=0).select(range(min(rows, len(both))))
        return self.batches(both, True, 0)
