"""Train or fine-tune a vision Transformer on labelled images, MoEfy it, and measure quality and time against compute.

    moefy train image_classification --config recipes/configs/vit_fashion/moefication.yaml

The stages are those of moefy train classification. Without --model_name_or_path a small model is trained from nothing,
with --model_type and --config_overrides; with it, a checkpoint is fine-tuned:

    ... --model_name_or_path google/vit-base-patch16-224-in21k --dataset_name ethz/food101 --test_split validation
"""

from functools import partial
from typing import Any

import torch
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    PreTrainedConfig,
    PreTrainedModel,
    ViTImageProcessor,
)

from ...data import pixels
from .. import arguments as of
from ..data import load_images, override
from ..inputs import resolve
from ..run import Run
from ..scores import Metrics, classes
from ..settings import Arguments
from ..stages import Stages
from .base import Task


def load(arguments: Arguments, stages: Stages) -> Run:
    """Load labelled images.

    Raises:
        ValueError: bad settings or data.
    """
    processor = make_processor(arguments[of.ImageModelArguments])
    splits, names = load_images(arguments.data)
    judge = Metrics(arguments[of.MetricArguments].metrics, sample=range(len(names)))
    collator = partial(collate, processor, arguments[of.ImageDataArguments])

    return Run(
        arguments,
        stages,
        splits,
        names,
        processor,
        AutoModelForImageClassification,
        judge,
        predict=classes,
        collator=collator,
        compute_metrics=judge.of_classes,
    )


def make_config(model: of.ImageModelArguments) -> PreTrainedConfig:
    """Return the config of the checkpoint, or of a new model.

    Raises:
        ValueError: an unknown model type or setting.
    """
    if model.model_name_or_path is not None:
        path, trust = resolve(model.model_name_or_path), model.trust_remote_code
        return AutoConfig.from_pretrained(path, revision=model.model_revision, trust_remote_code=trust)
    if model.model_type not in CONFIG_MAPPING:
        raise ValueError(f"unknown model_type {model.model_type!r}; choose one of transformers', e.g. vit")
    return override(CONFIG_MAPPING[model.model_type](), model.config_overrides)


def make_processor(model: of.ImageModelArguments) -> Any:
    """Load the image processor of the checkpoint, or make that of a new model."""
    config = make_config(model)
    if model.model_name_or_path is not None:
        return AutoImageProcessor.from_pretrained(resolve(model.model_name_or_path), revision=model.model_revision)
    size, half = {"height": config.image_size, "width": config.image_size}, [0.5] * config.num_channels
    return ViTImageProcessor(size=size, image_mean=half, image_std=half)


def make_model(run: Run) -> PreTrainedModel:
    """Load or make the dense model to train."""
    model = run.arguments[of.ImageModelArguments]
    if model.model_name_or_path is None:
        config = make_config(model)
        for name, value in run.labels().items():
            if name != "num_labels":  # which follows from the others
                setattr(config, name, value)
        return AutoModelForImageClassification.from_config(config)
    return AutoModelForImageClassification.from_pretrained(
        resolve(model.model_name_or_path),
        revision=model.model_revision,
        trust_remote_code=model.trust_remote_code,
        ignore_mismatched_sizes=True,  # the head is of other classes
        **run.labels(),
    )


def collate(processor: Any, data: of.ImageDataArguments, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Return rows of a dataset as a model-ready batch."""
    labels = torch.tensor([row[data.label_column] for row in rows])
    return {**pixels(processor, [row[data.image_column] for row in rows]), "labels": labels}


TASK = Task(
    __doc__,
    (of.ImageModelArguments, of.ImageDataArguments, of.MetricArguments, of.ScheduleArguments),
    load,
    make_model,
    metric="accuracy",
)
