"""Images out of image folders and datasets, as model-ready batches."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, overload

import torch
from transformers import PreTrainedModel

from ..errors import MoefyError
from .classes import Classes
from .columns import LABELS, is_image, no_column, usual_column
from .opening import open_dataset, said_plainly
from .tables import WINDOW, TextSource
from .texts import say

OF_TEXTS = ("text_column", "pair_column", "target_column")  # what a source says of texts alone


@dataclass(frozen=True)
class Images:
    """Images that were read, still encoded.

    Attributes:
        images: each as `datasets` stores it: its `bytes`, or the `path` of its file.
        labels: class ids of the model; None where they are not known.
    """

    images: list[dict[str, Any]]
    labels: list[int] | None = None

    def __len__(self) -> int:
        return len(self.images)

    def select(self, rows: Iterable[int]) -> "Images":
        """Return the rows at these positions, in this order."""
        rows = list(rows)
        return Images([self.images[row] for row in rows], self.labels and [self.labels[row] for row in rows])

    def unlabelled(self) -> "Images":
        """Return the images alone."""
        return replace(self, labels=None)


class ImageTable:
    """Labelled images that are there, and have not been read yet.

    Args:
        source: where they are: a folder of images, or a table with a column of them.

    Raises:
        MoefyError: there is nothing of this name, it cannot be read, it has no column of images or several, or
            something is said of texts.
    """

    def __init__(self, source: TextSource):
        if wrong := [f"--{name}" for name in OF_TEXTS if vars(source)[name]]:
            raise MoefyError(f"the model reads images: leave out {', '.join(wrong)}")
        self.source, self.path = source, source.path
        self.opened = open_dataset(source.path, source.streaming)
        columns = self.opened.columns
        self.images = [name for name, feature in columns.items() if is_image(feature)]
        if len(self.images) != 1:
            raise MoefyError(
                f"{self.path} has {len(self.images) or 'no'} columns of images among {', '.join(columns)}: give a "
                "folder of images, or a file or dataset with one such column"
            )
        if source.label_column is not None and source.label_column not in columns:
            raise MoefyError(no_column(self.path, source.label_column, columns))

    def read(self, model: PreTrainedModel) -> Images:
        """Read the images, in an order that is drawn with a seed: folders have them class by class.

        Args:
            model: whose class ids a classifier's labels become.

        Raises:
            MoefyError: there are none, all of a stream are wanted, a label is none of the model's, or the model has no
                use for labels.
        """
        source, columns = self.source, self.opened.columns
        source.check_bounded()
        label = None
        if model._get_name().endswith("ImageClassification"):
            label = source.label_column or usual_column(self.path, columns, "label", LABELS)
            if label is None:
                say(f"{no_column(self.path, 'label', columns)} (--label_column names another): classes are not known")
        elif source.label_column:
            raise MoefyError(f"a {model._get_name()} has no use for --label_column: leave it out")
        classes = Classes(model.config, self.path, columns, label) if label else None
        images, labels = [], []
        for number, (image, cell) in enumerate(self.cells(label), start=1):
            if image is None:
                raise MoefyError(f"{self.path}: row {number} has no image")
            images.append(image)
            if classes:
                labels.append(classes.of(number, cell))
        if not images:
            raise MoefyError(f"{self.path} holds no images")
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
        return Images(images, labels if classes else None).select(order.tolist())

    def cells(self, label: str | None) -> Iterable[tuple[Any, Any]]:
        """Yield the image and the label of each row, or of the first `max_rows`."""
        (image,), size = self.images, min(WINDOW, self.source.max_rows or WINDOW)
        label = label or image
        with said_plainly(self.path):
            rows = self.opened.dataset.select_columns([*{image, label}]).with_format("arrow")
            parts = (part.to_pydict() for part in rows.iter(batch_size=size))
            pairs = (pair for part in parts for pair in zip(part[image], part[label], strict=True))
            yield from islice(pairs, self.source.max_rows)


class ImageBatches(Sequence[dict[str, torch.Tensor]]):
    """Images as batches, each of which is made when it is asked for: as numbers, images are large.

    Args:
        images: that were read.
        processor: of the model.
        batch_size: images of a batch.
    """

    def __init__(self, images: Images, processor: Any, batch_size: int):
        self.images, self.processor, self.size = images, processor, batch_size

    def __len__(self) -> int:
        return -(-len(self.images) // self.size)

    @overload
    def __getitem__(self, place: int) -> dict[str, torch.Tensor]: ...
    @overload
    def __getitem__(self, place: slice) -> list[dict[str, torch.Tensor]]: ...
    def __getitem__(self, place: Any) -> Any:
        """Return a batch: `pixel_values` (B, C, H, W), and `labels` (B,) where they are known."""
        from datasets import Image

        if isinstance(place, slice):
            return [self[each] for each in range(*place.indices(len(self)))]
        if not 0 <= place < len(self):
            raise IndexError(place)
        part = self.images.select(range(place * self.size, min((place + 1) * self.size, len(self.images))))
        batch = pixels(self.processor, [Image().decode_example(image) for image in part.images])
        return batch if part.labels is None else {**batch, "labels": torch.tensor(part.labels)}


def pixels(processor: Any, images: Sequence[Any]) -> dict[str, torch.Tensor]:
    """Return pictures of PIL as a model reads them, grey for a processor of one channel, else in colours.

    Args:
        processor: an image processor of transformers.
        images: the pictures.
    """
    grey = len(processor.image_mean or ()) == 1
    return dict(processor([image.convert("L" if grey else "RGB") for image in images], return_tensors="pt"))
