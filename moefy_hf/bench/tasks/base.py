"""What is timed and measured of a kind of model, on the user's own texts or images."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, ClassVar

from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ...data import TextSource
from ...errors import MoefyError
from ..engines.base import Batch
from ..timing import Call, take_turns
from .inputs import INPUTS, Inputs

CHECKED_AT_ONCE = 16  # rows, where quality is measured
TRIED = 2  # batches, on which engines are compared with the model
SIZES = (1, 8, 32)
FLAGS = {  # options -> what sets them on the command line
    **{"batch_sizes": "--batch_sizes", "max_length": "--max_length"},
    **{"prompt": "--generate", "new_tokens": "--generate"},
}


@dataclass(frozen=True)
class Reading:
    """How rows are read. What is None has the default of the kind of model.

    Args:
        data: where texts or images come from.
        batch_sizes: rows at once, of encoders and encoder-decoders (1, 8, 32).
        max_length: tokens of a text (256).
        prompt: tokens that a language model reads (64), or an encoder-decoder at most.
        new_tokens: that they write (32).
        rounds, seconds: as in `Settings`, for each figure.
    """

    data: TextSource
    batch_sizes: tuple[int, ...] | None = None
    max_length: int | None = None
    prompt: int | None = None
    new_tokens: int | None = None
    rounds: int = 40
    seconds: float = 300

    @property
    def said(self) -> dict[str, Any]:
        """Return the options that are given."""
        return {name: vars(self)[name] for name in FLAGS if vars(self)[name] is not None}

    def options(self, defaults: Mapping[str, Any], model: PreTrainedModel) -> dict[str, Any]:
        """Return the options of a kind of model, where nothing is said of one its default.

        Raises:
            MoefyError: something is said that this kind has no use for.
        """
        if wrong := flags(name for name in self.said if name not in defaults):
            known = flags(defaults)
            raise MoefyError(f"a {model._get_name()} has no use for {wrong}: leave it out; it takes {known}")
        return {**defaults, **self.said}


def flags(options: Iterable[str]) -> str:
    """Return what sets some options."""
    return ", ".join(dict.fromkeys(FLAGS[name] for name in options))


@dataclass(frozen=True)
class Timed:
    """What was timed: `taken` are the seconds of each model, one number per round.

    Attributes:
        work: "forward" (of an encoder-decoder, its encoder), "prompt" or "generate".
        batch: rows at once.
        amount: tokens that are read, padding included, or written, the median of the rounds; or images.
        taken: by model.
        unit: "tokens" or "images".
    """

    work: str
    batch: int
    amount: int
    taken: dict[str, list[float]]
    unit: str = "tokens"


class Task(ABC):
    """What a kind of model does.

    Args:
        reading: how rows are read.
        model: the dense model.
        processor: of the model: a tokenizer, or an image processor.
        progress: whether bars are shown.

    Attributes:
        defaults: the options that it takes, beside those of what is read.
        reads: main inputs of models.
        options: that are asked for, or else by default.
        inputs: what was read.
        batches: some without labels, on which models are tried.

    Raises:
        MoefyError: `reading.data` cannot be read, or does not suit the model; or an option that has no use.
    """

    defaults: ClassVar[Mapping[str, Any]]
    reads: ClassVar[tuple[str, ...]] = ("input_ids",)

    def __init__(self, reading: Reading, model: PreTrainedModel, processor: Any, progress: bool = True):
        if model.main_input_name not in self.reads:
            raise MoefyError(
                f"a {model._get_name()} reads {model.main_input_name}, and --data are texts, or images of encoders"
            )
        self.reading, self.model, self.processor, self.progress = reading, model, processor, progress
        kind = INPUTS[model.main_input_name]
        self.options = self.chosen({**self.defaults, **kind.defaults})
        self.inputs: Inputs = kind(reading.data, model, processor, self.options)
        self.read()

    def chosen(self, defaults: Mapping[str, Any]) -> dict[str, Any]:
        """Return the options, of which these are the defaults.

        Raises:
            MoefyError: one that is given has no use.
        """
        return self.reading.options(defaults, self.model)

    def to_dict(self) -> dict[str, Any]:
        """Return what rows depend on, for the record: "data" is the name of the texts or images."""
        data = self.reading.data
        source = {name: value for name, value in asdict(data).items() if value and name != "path"}
        limits = {"rounds": self.reading.rounds, "seconds": self.reading.seconds}
        return {"data": data.name} | source | self.options | limits

    @abstractmethod
    def read(self) -> None:
        """Make batches of what was read."""

    @property
    @abstractmethod
    def batches(self) -> Sequence[Batch]: ...

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

    def full_batches(self, size: int) -> Sequence[Batch]:
        """Return whole batches of a size without labels, as many as rounds want.

        Raises:
            MoefyError: there are fewer rows than one batch takes.
        """
        return self.inputs.full_batches(size, self.reading.rounds)

    def turns(
        self, title: str, running: Mapping[str, Any], work: Sequence[Any], call: Callable[[Any, Any], Any]
    ) -> dict[str, list[float]]:
        """Time calls in turns, after each was made once.

        Args:
            title: of the bar.
            running: the models.
            work: one for each round, from the beginning again where rounds are more.
            call: what is timed, of a model and its work.
        """

        def prepare(turn: int) -> dict[str, Call]:
            each = work[turn % len(work)]
            return {name: partial(call, model, each) for name, model in running.items()}

        for first in prepare(0).values():
            first()
        return take_turns(prepare, self.reading.rounds, self.reading.seconds, title, self.progress)

    def bar(self, items: Sequence[Any], title: str = "quality") -> Any:
        """Return the items, with a progress bar."""
        return tqdm(items, desc=title, disable=not self.progress, leave=False)
