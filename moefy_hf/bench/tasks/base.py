"""What is timed and measured of a kind of model, on the user's own texts."""

import statistics
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...data import TextBatches, decoder_start_of, longest_text, read_texts
from ...errors import MoefyError
from ...measure.batches import check_batch
from ..engines.base import Batch
from ..timing import Call, take_turns

CHECKED_AT_ONCE = 16  # texts, where quality is measured


@dataclass(frozen=True)
class Reading:
    """How texts are read.

    Args:
        data: csv file with columns text and label, or text file with a text per line.
        batch_sizes: texts at once, of encoders and encoder-decoders.
        max_length: tokens of a text.
        max_rows: texts, at most; None: all.
        prompt, new_tokens: what a language model reads, and how many tokens it or an encoder-decoder writes.
        rounds, seconds: as in `Settings`, for each figure.
    """

    data: str
    batch_sizes: tuple[int, ...] = (1, 8, 32)
    max_length: int = 256
    max_rows: int | None = None
    prompt: int = 64
    new_tokens: int = 32
    rounds: int = 40
    seconds: float = 300


@dataclass(frozen=True)
class Timed:
    """What was timed: `taken` are the seconds of each model, one number per round.

    Attributes:
        work: "forward" (of an encoder-decoder, its encoder), "prompt" or "generate".
        batch: texts at once.
        tokens: that are read, padding included, or written; the median of the rounds.
    """

    work: str
    batch: int
    tokens: int
    taken: dict[str, list[float]]


class Task(ABC):
    """What a kind of model does.

    Args:
        reading: how texts are read.
        model: the dense model.
        tokenizer: of the model.
        progress: whether bars are shown.

    Attributes:
        batches: of texts, without labels, on which models are tried.

    Raises:
        MoefyError: `reading.data` cannot be read, or does not suit the model.
    """

    def __init__(
        self, reading: Reading, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, progress: bool = True
    ):
        if model.main_input_name != "input_ids":
            raise MoefyError(f"a {model._get_name()} reads {model.main_input_name}, and --data are texts")
        self.reading, self.model, self.tokenizer, self.progress = reading, model, tokenizer, progress
        self.max_length = longest_text(model, tokenizer, reading.max_length)
        self.read()
        for batch in self.batches:
            check_batch(model, batch)

    @abstractmethod
    def read(self) -> None:
        """Read the data."""

    @property
    @abstractmethod
    def batches(self) -> list[Batch]: ...

    @abstractmethod
    def quality(self, running: Mapping[str, Any], most: int | None = None) -> tuple[str, dict[str, float]]:
        """Return what was measured, and how good each model is; the first is dense, and others are compared with it.

        Args:
            running: name -> model, as engines give it.
            most: stop after so many batches.
        """

    @abstractmethod
    def times(self, running: Mapping[str, Any]) -> list[Timed]:
        """Time the models in turns."""

    def texts(self) -> list[str]:
        """Return the texts, as many as are wanted."""
        return read_texts(self.reading.data)[: self.reading.max_rows]

    def in_batches(self, texts: list[str], size: int, labels: list[int] | None = None) -> TextBatches:
        """Return texts in batches of a size, as the model reads them."""
        start = None if self.model.can_generate() else decoder_start_of(self.model)
        length, tokenizer = self.max_length, self.tokenizer
        return TextBatches(texts, tokenizer, labels=labels, max_length=length, batch_size=size, decoder_start=start)

    def full_batches(self, texts: list[str], size: int) -> list[Batch]:
        """Return whole batches of a size, as many as rounds want.

        Raises:
            MoefyError: there are fewer texts than one batch takes.
        """
        if len(texts) < size:
            raise MoefyError(f"{self.reading.data} has {len(texts)} texts, too few for a batch of {size}")
        return list(self.in_batches(texts[: size * min(self.reading.rounds, len(texts) // size)], size))

    def turns(self, title: str, work: Sequence[Mapping[str, Call]]) -> dict[str, list[float]]:
        """Time calls in turns, after each was made once."""
        for call in work[0].values():
            call()
        rounds, seconds = self.reading.rounds, self.reading.seconds
        return take_turns(lambda turn: work[turn % len(work)], rounds, seconds, title, self.progress)

    def bar(self, items: Sequence[Any], title: str = "quality") -> Any:
        """Return the items, with a progress bar."""
        return tqdm(items, desc=title, disable=not self.progress, leave=False)


def is_csv(path: str) -> bool:
    """Return whether a file has columns."""
    return Path(path).suffix.lower() == ".csv"


def unlabelled(batch: Batch) -> Batch:
    """Return a batch without its labels, of which models would compute a loss."""
    return {name: value for name, value in batch.items() if name != "labels"}


def median_tokens(batches: Sequence[Batch]) -> int:
    """Return the tokens of a batch, padding included."""
    return int(statistics.median(batch["input_ids"].numel() for batch in batches))
