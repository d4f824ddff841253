"""Train or fine-tune a vision Transformer on labelled images, MoEfy it, and measure quality against compute.

    accelerate launch recipes/moefy_image_classification.py --config recipes/configs/vit_fashion/moefication.yaml

The stages are those of moefy_classification.py. Without --model_name_or_path a small model is trained from nothing,
with --model_type and --config_overrides; with it, a checkpoint is fine-tuned:

    ... --model_name_or_path google/vit-base-patch16-224-in21k --dataset_name ethz/food101 --test_split validation
"""

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import real_inputs
import torch
from common import CollatedBatches, MoeficationArguments, load_splits, override, parse
from datasets import ClassLabel, DatasetDict
from pipeline import classify
from run import Run, accuracy_of_classes, begin_stages
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    PreTrainedConfig,
    PreTrainedModel,
    TrainingArguments,
    ViTImageProcessor,
)


@dataclass
class ImageModelArguments:
    """The dense model to start from."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Hub id or local directory; nothing trains a new model"}
    )
    model_revision: str = field(default="main", metadata={"help": "branch, tag or commit on the Hub"})
    model_type: str = field(default="vit", metadata={"help": "architecture of a new model"})
    config_overrides: str = field(
        default="", metadata={"help": "sizes of a new model: hidden_size=192,num_hidden_layers=6,..."}
    )
    trust_remote_code: bool = field(default=False, metadata={"help": "run modeling code that comes with the model"})
    activation: str | None = field(
        default=None, metadata={"help": "swap the FFN activation for this one before training, e.g. relu"}
    )


@dataclass
class ImageDataArguments:
    """Labelled images."""

    dataset_name: str = field(metadata={"help": "Hub id, local directory of parquet files, or package:NAME"})
    dataset_config_name: str | None = field(default=None, metadata={"help": "configuration of a Hub dataset"})
    image_column: str = field(default="image", metadata={"help": "column with the image"})
    label_column: str = field(default="label", metadata={"help": "column with the label, a ClassLabel"})
    validation_split: str = field(
        default="validation", metadata={"help": "name of the validation split; a tenth of train where there is none"}
    )
    test_split: str = field(default="test", metadata={"help": "name of the test split"})
    max_train_samples: int | None = field(default=None, metadata={"help": "train on so many rows (seeded)"})


def main() -> None:
    types = (ImageModelArguments, ImageDataArguments, MoeficationArguments, TrainingArguments)
    model_args, data_args, moe_args, training_args = parse(types, __doc__)
    stages = begin_stages(moe_args, training_args, model_args, data_args)
    config = make_config(model_args)
    splits, names = load_images(data_args)
    processor = make_processor(model_args, config)
    if training_args.should_save:
        stages.begin()
    collator = partial(collate, processor, data_args)

    def batches(rows, shuffle, seed):
        return CollatedBatches(rows, collator, shuffle=shuffle, seed=seed)

    auto = AutoModelForImageClassification
    metrics = accuracy_of_classes
    run = Run(moe_args, training_args, stages, splits, names, processor, auto, batches, collator, metrics=metrics)
    classify(run, partial(make_model, run, model_args, config), model_args.activation)


def make_config(model_args: ImageModelArguments) -> PreTrainedConfig:
    """Of the checkpoint, or of a new model.

    Raises:
        ValueError: an unknown model type or setting.
    """
    if model_args.model_name_or_path is not None:
        path, revision = real_inputs.resolve(model_args.model_name_or_path), model_args.model_revision
        return AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=model_args.trust_remote_code)
    if model_args.model_type not in CONFIG_MAPPING:
        raise ValueError(f"unknown model_type {model_args.model_type!r}; choose one of transformers', e.g. vit")
    return override(CONFIG_MAPPING[model_args.model_type](), model_args.config_overrides)


def load_images(data: ImageDataArguments) -> tuple[DatasetDict, list[str]]:
    """Train, validation and test splits, and the names of the classes.

    Raises:
        ValueError: a split or column is missing, or labels are not classes; what there is is named.
    """
    raw = load_splits(data, ("train", data.test_split), (data.image_column, data.label_column))
    feature = raw["train"].features[data.label_column]
    if not isinstance(feature, ClassLabel):
        raise ValueError(f"column {data.label_column!r} of {data.dataset_name} is no ClassLabel but {feature}")
    train = raw["train"]
    if data.validation_split in raw:
        validation = raw[data.validation_split]
    else:
        parts = train.train_test_split(test_size=0.1, seed=0, stratify_by_column=data.label_column)
        train, validation = parts["train"], parts["test"]
    if data.max_train_samples is not None:
        train = train.shuffle(seed=0).select(range(min(data.max_train_samples, len(train))))
    return DatasetDict(train=train, validation=validation, test=raw[data.test_split]), feature.names


def make_processor(model_args: ImageModelArguments, config: PreTrainedConfig) -> Any:
    if model_args.model_name_or_path is not None:
        return AutoImageProcessor.from_pretrained(
            real_inputs.resolve(model_args.model_name_or_path), revision=model_args.model_revision
        )
    size, half = {"height": config.image_size, "width": config.image_size}, [0.5] * config.num_channels
    return ViTImageProcessor(size=size, image_mean=half, image_std=half)


def make_model(run: Run, model_args: ImageModelArguments, config: PreTrainedConfig) -> PreTrainedModel:
    """The dense model to train."""
    if model_args.model_name_or_path is None:
        for name, value in run.labels().items():
            if name != "num_labels":  # which follows from the others
                setattr(config, name, value)
        return AutoModelForImageClassification.from_config(config)
    return AutoModelForImageClassification.from_pretrained(
        real_inputs.resolve(model_args.model_name_or_path),
        revision=model_args.model_revision,
        trust_remote_code=model_args.trust_remote_code,
        ignore_mismatched_sizes=True,  # the head is of other classes
        **run.labels(),
    )


def collate(processor: Any, data: ImageDataArguments, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Rows of a dataset as a model-ready batch."""
    channels = len(processor.image_mean)
    images = [row[data.image_column].convert("L" if channels == 1 else "RGB") for row in rows]
    labels = torch.tensor([row[data.label_column] for row in rows])
    return {**processor(images, return_tensors="pt"), "labels": labels}


if __name__ == "__main__":
    main()
