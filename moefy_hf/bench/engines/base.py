"""What an engine is, what it is given, and what runs in it: an encoder, a language model or an encoder-decoder."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import PreTrainedModel

from ...errors import MoefyError
from ...loading import MoefiedModel
from ...measure.metrics import is_causal

Batch = dict[str, torch.Tensor]
ENCODER, LANGUAGE_MODEL, ENCODER_DECODER = "encoder", "language model", "encoder-decoder"  # kinds of models


class Encoder(Protocol):
    """Runs a batch of texts in one pass."""

    def __call__(self, batch: Batch, /) -> Mapping[str, Any]:
        """Return the outputs by their names in transformers: logits, or hidden states first."""


class LanguageModel(Protocol):
    """Reads one text, and remembers what it has read."""

    def forget(self) -> None:
        """Begin a new text."""

    def read(self, ids: torch.Tensor, last: bool = False) -> torch.Tensor:
        """Read further tokens (n,); return logits (n, V) after each, or (1, V) after the last one alone."""


class EncoderDecoder(Protocol):
    """Reads a batch of texts, and writes others."""

    def encode(self, batch: Batch) -> torch.Tensor:
        """Return the encoder's hidden states (B, L, d)."""

    def generate(self, batch: Batch, most: int, least: int = 0) -> torch.Tensor:
        """Return the tokens (B, n) that are written greedily, from `least` to `most` of each text."""


Running = Encoder | LanguageModel | EncoderDecoder


@dataclass(frozen=True)
class Subject:
    """The model that engines run.

    Attributes:
        dense: as transformers loads it.
        moefied: on the same weights, masked, at its budget.
        auto: the same, computing selected experts alone.
        batches: of texts, on which a file that is written is compared with the model.
        folder: that gets files, and goes at the end.
        tokens: of a text, at most, with those that are generated.
        threads: of the CPU.
        gguf: the dense model's file for llama.cpp, or None.
    """

    dense: PreTrainedModel
    moefied: MoefiedModel
    auto: MoefiedModel
    batches: Sequence[Batch]
    folder: Path
    tokens: int
    threads: int
    gguf: str | None = None

    @property
    def kind(self) -> str:
        """Return which kind of model this is."""
        return kind_of(self.dense)


def kind_of(model: PreTrainedModel) -> str:
    """Return which kind of model this is: what it does is timed, and how it is run."""
    if is_causal(model):
        return LANGUAGE_MODEL
    return ENCODER_DECODER if model.config.is_encoder_decoder and model.can_generate() else ENCODER


class Engine(ABC):
    """Runs a model outside of plain PyTorch, dense and MoEfied.

    Attributes:
        name: on the command line.
        modules: that are imported.
        distribution: whose version is noted.
        extra: of this package, which installs it.
        kinds: of models that it runs.
        reads_gguf: whether it wants the dense model's file for llama.cpp.
    """

    modules: tuple[str, ...]
    distribution: str
    extra: str
    kinds: tuple[str, ...]
    reads_gguf = False

    def __init__(self, name: str):
        self.name = name

    def check_installed(self) -> None:
        """Check that its packages are there.

        Raises:
            MoefyError: they are not; says how to install them.
        """
        missing = [module for module in self.modules if find_spec(module) is None]
        if missing:
            raise MoefyError(f"{self.name} needs {', '.join(missing)}: pip install 'moefy-hf[{self.extra}]'")

    def check(self, model: MoefiedModel, gguf: str | None) -> None:
        """Check, before anything is made, that it runs a model.

        Args:
            model: the MoEfied one.
            gguf: the dense model's file for llama.cpp, or None.

        Raises:
            MoefyError: it does not.
        """
        if kind_of(model) not in self.kinds:
            raise MoefyError(f"{self.name} runs {' and '.join(self.kinds)}s, and {model._get_name()} is none")

    def version(self) -> str:
        """Return its version."""
        return version(self.distribution)

    @abstractmethod
    def dense(self, subject: Subject) -> Running:
        """Return the dense model in this engine."""

    @abstractmethod
    def moefied(self, subject: Subject) -> Running:
        """Return the MoEfied model in this engine."""
