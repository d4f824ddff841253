"""What is timed and measured of a kind of model, on the user's own texts."""

import statistics
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...data import CutTexts, TextBatches, Texts, TextSource, decoder_start_of, longest_text
from ...errors import MoefyError
from ...measure.batches import check_batch
from ..engines.base import Batch
from ..timing import Call, take_turns

CHECKED_AT_ONCE = 16  # texts, where quality is measured


@dataclass(frozen=True)
class Reading:
    """How texts are read.

    Args:
        data: where they come from.
        batch_sizes: texts at once, of encoders and encoder-decoders.
        max_length: tokens of a text.
        prompt, new_tokens: what a language model reads, and how many tokens it or an encoder-decoder writes.
        rounds, seconds: as in `Settings`, for each figure.
    """

    data: TextSource
    batch_sizes: tuple[int, ...] = (1, 8, 32)
    max_length: int = 256
    prompt: int = 64
    new_tokens: int = 32
    rounds: int = 40
    seconds: float = 300

    def to_dict(self) -> dict[str, Any]:
        """Return what rows depend on, for the record: "data" is the name of the texts."""
        source = {name: value for name, value in asdict(self.data).items() if value and name != "path"}
        return asdict(self) | source | {"data": self.data.name}


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
        texts: that were read, with class ids or targets where there are some.
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
        self.texts = reading.data.open().read(model, labels=True)
        self.cut = CutTexts(tokenizer, self.max_length)
        self.read()
        for batch in self.batches:
            check_batch(model, batch)

    @abstractmethod
    def read(self) -> None:
        """Tokenise the texts."""

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

    def in_batches(self, texts: Texts, size: int) -> TextBatches:
        """Return texts in batches of a size, as the model reads them."""
        start = None if self.model.can_generate() else decoder_start_of(self.model)
        length, cut = self.max_length, self.cut
        return TextBatches(texts, self.tokenizer, max_length=length, batch_size=size, decoder_start=start, cut=cut)

    def full_batches(self, size: int) -> list[Batch]:
        """Return whole batches of a size, as many as rounds want.

        Raises:
            MoefyError: there are fewer texts than one batch takes.
        """
        count = len(self.texts)
        if count < size:
            raise MoefyError(f"{self.reading.data.name} has {count} texts, too few for a batch of {size}")
        texts = self.texts.select(range(size * min(self.reading.rounds, count // size)))
        return list(self.in_batches(replace(texts, labels=None, targets=None), size))

    def turns(self, title: str, work: Sequence[Mapping[str, Call]]) -> dict[str, list[float]]:
        """Time calls in turns, after each was made once."""
        for call in work[0].values():
            call()
        rounds, seconds = self.reading.rounds, self.reading.seconds
        return take_turns(lambda turn: work[turn % len(work)], rounds, seconds, title, self.progress)

    def bar(self, items: Sequence[Any], title: str = "quality") -> Any:
        """Return the items, with a progress bar."""
        return tqdm(items, desc=title, disable=not self.progress, leave=False)


def median_tokens(batches: Sequence[Batch]) -> int:
    """Return the tokens of a batch, padding included."""
    return int(statistics.median(batch["input_ids"].numel() for batch in batches))
