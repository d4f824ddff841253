"""How fast a MoEfied model is beside its dense self, in one runtime, on held-out rows."""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from ..bench.engines import ENGINES, PYTORCH
from ..bench.engines.base import ENCODER, ENCODER_DECODER, LANGUAGE_MODEL, Batch, Engine, Running, Subject, kind_of
from ..bench.tasks.language_models import continued, first
from ..bench.timing import Call, against, quartiles, take_turns, threads_set
from ..errors import MoefyError
from ..loading import MoefiedModel
from ..measure.batches import rows_in, unlabelled
from ..measure.contexts import all_experts

RUNTIMES: dict[str, Engine] = {"pytorch": PYTORCH, **ENGINES}
DENSE, MOEFIED = "dense", "MoEfied"
ROUNDS = 200  # at most, within the seconds
TRIED = 2  # batches on which a file that is written is compared with the model


@dataclass(frozen=True)
class Load:
    """What is timed.

    Args:
        runtime: of `RUNTIMES`.
        batch: texts at once.
        prompt, new_tokens: that a language model reads and writes; an encoder-decoder writes as many.
        threads: of the CPU.
        seconds: for each figure; five rounds are run however long they take.
        gguf: the dense model's file, for llama.cpp.

    Raises:
        MoefyError: an unknown runtime, or one that is not installed, or a number below 1.
    """

    runtime: str = "pytorch"
    batch: int = 1
    prompt: int = 64
    new_tokens: int = 32
    threads: int = 1
    seconds: float = 6
    gguf: str | None = None

    def __post_init__(self) -> None:
        if self.runtime not in RUNTIMES:
            raise MoefyError(f"unknown runtime {self.runtime!r}; choose from {', '.join(RUNTIMES)}")
        RUNTIMES[self.runtime].check_installed()
        for name in ("batch", "prompt", "new_tokens", "threads"):
            if vars(self)[name] < 1:
                raise MoefyError(f"{name} must be 1 or more, got {vars(self)[name]}")


@dataclass(frozen=True)
class Speed:
    """Times as fast as the dense model: the median of rounds, and its quartiles; milliseconds of both models."""

    ratio: float
    spread: tuple[float, float]
    dense_milliseconds: float
    milliseconds: float


class Clock:
    """Times a dense model and what becomes of it, in turns.

    Args:
        load: what is timed.
        dense: the model.
        batches: model-ready ones, whose rows are timed.
        progress: whether bars are shown.

    Raises:
        MoefyError: a model or a number of rows that this runtime cannot be timed on.
    """

    def __init__(
        self, load: Load, dense: PreTrainedModel, batches: Sequence[Mapping[str, Any]], progress: bool = True
    ):
        self.load, self.dense, self.progress = load, dense, progress
        self.engine, self.kind = RUNTIMES[load.runtime], kind_of(dense)
        if self.kind not in self.engine.kinds:
            raise MoefyError(f"{load.runtime} runs {' and '.join(self.engine.kinds)}s, not a {dense._get_name()}")
        if self.engine.reads_gguf and load.gguf is None:
            raise MoefyError(f"{load.runtime} needs the dense model's GGUF file (--dense)")
        if self.kind == LANGUAGE_MODEL and load.batch > 1:
            raise MoefyError(f"language models are timed one text at once, got batch {load.batch}")
        self.work = prompts(load, batches) if self.kind == LANGUAGE_MODEL else rebatched(dense, load.batch, batches)
        self.tried = [as_read(batch, self.kind) for batch in batches[:TRIED]]
        self.running: Running | None = None

    def check(self, masked: MoefiedModel) -> None:
        """Check that the runtime has this model.

        Raises:
            MoefyError: it has not.
        """
        self.engine.check(masked, self.load.gguf)

    def speed(self, masked: MoefiedModel, auto: MoefiedModel) -> Speed:
        """Time a MoEfied model at its budget.

        Args:
            masked: the model.
            auto: the same, computing selected experts alone.
        """
        with tempfile.TemporaryDirectory() as folder:
            subject = self.subject(masked, auto, folder)
            if self.running is None:
                with all_experts(masked):
                    self.running = self.engine.dense(subject)
            return self.compared(self.running, self.engine.moefied(subject))

    def dense_elsewhere(self, engine: Engine, masked: MoefiedModel) -> Speed:
        """Time the dense model in another engine, beside the one in PyTorch.

        Args:
            engine: that has this model.
            masked: any MoEfied model that is made of it, of which engines make the dense one.
        """
        with tempfile.TemporaryDirectory() as folder:
            subject = self.subject(masked, masked, folder)
            with all_experts(masked):
                return self.compared(RUNTIMES["pytorch"].dense(subject), engine.dense(subject))

    def subject(self, masked: MoefiedModel, auto: MoefiedModel, folder: str) -> Subject:
        """Return what engines are given."""
        tokens = self.load.prompt + self.load.new_tokens
        tokens = max([tokens, *(batch["input_ids"].shape[-1] for batch in self.tried if "input_ids" in batch)])
        threads, gguf = self.load.threads, self.load.gguf
        return Subject(self.dense, masked, auto, self.tried, Path(folder), tokens, threads, gguf)

    def compared(self, dense: Running, other: Running) -> Speed:
        """Time two models in turns."""
        models = {DENSE: dense, MOEFIED: other}
        turns = [{name: self.call(model, batch) for name, model in models.items()} for batch in self.work]
        with torch.inference_mode(), threads_set(self.load.threads):
            for call in turns[0].values():
                call()  # the first one prepares what later ones use
            title = f"{self.load.runtime}, batches of {self.load.batch}"
            taken = take_turns(lambda turn: turns[turn % len(turns)], ROUNDS, self.load.seconds, title, self.progress)
        found = against(taken[DENSE], taken[MOEFIED])
        middles = [1e3 * quartiles(taken[name])[1] for name in (DENSE, MOEFIED)]
        return Speed(found["ratio"], cast(Any, tuple(found["spread"])), *middles)

    def call(self, model: Any, batch: Batch) -> Call:
        """Return what is timed of a model on a batch: a pass, or all that is written after it."""
        new = self.load.new_tokens
        if self.kind == ENCODER:
            return partial(model, batch)
        if self.kind == ENCODER_DECODER:
            return partial(model.generate, batch, new, new)
        return lambda: continued(model, first(model, batch["input_ids"]), new)


def as_read(batch: Mapping[str, Any], kind: str) -> Batch:
    """Return the tensors of a batch that a kind of model reads: no labels, and nothing that it writes itself."""
    writes = kind == ENCODER_DECODER
    return {name: each for name, each in unlabelled(batch).items() if not (writes and name.startswith("decoder_"))}


def rows_of(batches: Sequence[Mapping[str, Any]], kind: str) -> Iterator[Batch]:
    """Return the rows of batches, without padding."""
    for batch in batches:
        given = as_read(batch, kind)
        for row in range(rows_in(given)):
            values = {name: value[row] for name, value in given.items()}
            for side in ("", "decoder_"):
                if f"{side}attention_mask" in values:
                    text = values[f"{side}attention_mask"].bool()
                    own = [name for name in values if name.startswith("decoder_") == bool(side)]
                    values |= {name: values[name][text] for name in own if values[name].shape[:1] == text.shape}
            yield values


def rebatched(model: PreTrainedModel, size: int, batches: Sequence[Mapping[str, Any]]) -> list[Batch]:
    """Return whole batches of a size, padded to their longest row.

    Raises:
        MoefyError: there are fewer rows than that.
    """
    rows = list(rows_of(batches, kind_of(model)))
    if len(rows) < size:
        raise MoefyError(f"{len(rows)} held-out rows are too few for a batch of {size}")
    starts = range(0, len(rows) - size + 1, size)
    return [padded(rows[start : start + size], model.config.get_text_config()) for start in starts]


def padded(rows: Sequence[Batch], config: Any) -> Batch:
    """Return rows as a batch, padded behind."""
    found = {}
    for name in set.intersection(*(set(row) for row in rows)):
        fill = getattr(config, "pad_token_id", None) or 0 if name.endswith("input_ids") else 0
        found[name] = pad_sequence([row[name] for row in rows], batch_first=True, padding_value=fill)
    return found


def prompts(load: Load, batches: Sequence[Mapping[str, Any]]) -> list[Batch]:
    """Return prompts {"input_ids": (n,)} of the stream of all rows.

    Raises:
        MoefyError: there are fewer tokens than one takes.
    """
    stream = torch.cat([row["input_ids"] for row in rows_of(batches, LANGUAGE_MODEL)])
    if len(stream) < load.prompt:
        raise MoefyError(f"{len(stream)} held-out tokens are too few for a prompt of {load.prompt}")
    return [{"input_ids": ids} for ids in stream[: len(stream) // load.prompt * load.prompt].view(-1, load.prompt)]
