"""What models read: the user's own texts, or images."""

import statistics
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from transformers import AutoImageProcessor, AutoTokenizer, PreTrainedModel

from ...data import (
    CutTexts,
    ImageBatches,
    Images,
    ImageTable,
    TextBatches,
    Texts,
    TextSource,
    decoder_start_of,
    longest_text,
)
from ...errors import MoefyError
from ...measure.batches import check_batch
from ..engines.base import Batch


class Inputs(ABC):
    """Rows that were read, as a model reads them.

    Args:
        data: where they come from.
        model: that reads them.
        processor: of the model: a tokenizer, or an image processor.
        options: of `defaults`, and others.

    Attributes:
        rows: that were read, with class ids or targets where there are some.
        defaults: what a user may set of them.
        unit: what a speed is given in.
        plural: what rows are called.
        auto: loads the processor.

    Raises:
        MoefyError: `data` cannot be read, or does not suit the model.
    """

    rows: Any
    defaults: ClassVar[Mapping[str, Any]] = {}
    unit: ClassVar[str]
    plural: ClassVar[str]
    auto: ClassVar[Any]

    def __init__(self, data: TextSource, model: PreTrainedModel, processor: Any, options: Mapping[str, Any]):
        self.data, self.model, self.processor, self.options = data, model, processor, options
        self.read()

    @abstractmethod
    def read(self) -> None:
        """Read the rows."""

    @abstractmethod
    def in_batches(self, rows: Any, size: int) -> Sequence[Batch]:
        """Return rows in batches of a size, the last of which may be smaller."""

    @abstractmethod
    def amount(self, batches: Sequence[Batch]) -> int:
        """Return how many units a batch has, by the median."""

    def full_batches(self, size: int, most: int) -> Sequence[Batch]:
        """Return whole batches of a size without labels.

        Raises:
            MoefyError: there are fewer rows than one batch takes.
        """
        count = len(self.rows)
        if count < size:
            raise MoefyError(f"{self.data.name} has {count} {self.plural}, too few for a batch of {size}")
        return self.in_batches(self.rows.select(range(size * min(most, count // size))).unlabelled(), size)


class TextInputs(Inputs):
    """Texts, padded to the longest of a batch. How many were cut is said once."""

    rows: Texts
    defaults = {"max_length": 256}
    unit, plural, auto = "tokens", "texts", AutoTokenizer

    def read(self) -> None:
        self.max_length = longest_text(self.model, self.processor, self.options["max_length"])
        self.rows = self.data.open().read(self.model, labels=True)
        self.cut = CutTexts(self.processor, self.max_length)

    def in_batches(self, rows: Texts, size: int) -> Sequence[Batch]:
        start = None if self.model.can_generate() else decoder_start_of(self.model)
        limits: dict[str, Any] = {"max_length": self.max_length, "cut": self.cut}
        batches = list(TextBatches(rows, self.processor, batch_size=size, decoder_start=start, **limits))
        for batch in batches:
            check_batch(self.model, batch)
        return batches

    def amount(self, batches: Sequence[Batch]) -> int:
        return int(statistics.median(batch["input_ids"].numel() for batch in batches))


class ImageInputs(Inputs):
    """Images, of the size that the model's processor gives them."""

    rows: Images
    unit, plural, auto = "images", "images", AutoImageProcessor

    def read(self) -> None:
        self.rows = ImageTable(self.data).read(self.model)

    def in_batches(self, rows: Images, size: int) -> Sequence[Batch]:
        return ImageBatches(rows, self.processor, size)

    def amount(self, batches: Sequence[Batch]) -> int:
        return len(batches[0]["pixel_values"])


INPUTS: dict[str, type[Inputs]] = {"input_ids": TextInputs, "pixel_values": ImageInputs}  # by a model's main input


def load_processor(model: PreTrainedModel, name: str) -> Any:
    """Load the tokenizer or the image processor of a model's checkpoint; None of a model that reads neither.

    Raises:
        MoefyError: there is none.
    """
    if model.main_input_name not in INPUTS:
        return None
    auto = INPUTS[model.main_input_name].auto
    try:
        return auto.from_pretrained(name)
    except (ValueError, OSError, ImportError) as error:
        kind = "image processor" if auto is AutoImageProcessor else "tokenizer"
        raise MoefyError(f"the {kind} of {name} cannot be loaded: {error}") from error
