"""What a conversion costs in quality on rows that it was not fitted on, and how sure that is."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..bench.tasks.encoders import has_head, states
from ..errors import MoefyError
from ..measure.batches import check_batch, rows_in
from ..measure.contexts import evaluating
from ..measure.metrics import OVERFLOW, counted, is_causal, usable

ROWS, POSITIONS = 1024, 4096  # no further rows are read after so many
TOKENS, IMAGES = 256, 16  # that are compared at once
LEAST, SOON = 8, 256  # rows without which nothing is sure, and positions that are read however clear it is
ACCURACY, PERPLEXITY, AGREEMENT, COSINE = "accuracy", "perplexity", "agreement", "cosine"


@dataclass(frozen=True)
class Relative:
    """Quality relative to the dense model's on the same rows.

    Attributes:
        value: 1 is dense. Of a perplexity less is better.
        error: its standard error, rows being independent.
    """

    value: float
    error: float


class HeldOut:
    """Rows that nothing is fitted on, and what the dense model makes of them.

    Args:
        model: the dense one.
        batches: model-ready batches. With labels accuracy counts, of language models perplexity; without, how often
            best guesses are the dense model's; without a head, the cosine of hidden states with its own.
        progress: whether a bar is shown.

    Attributes:
        measure: what counts.
        dense: the dense model's own accuracy or perplexity; 1 for the others.
        positions: how many were compared.

    Raises:
        MoefyError: no batch, one that the model cannot run on, or predictions that cannot be compared.
    """

    def __init__(self, model: PreTrainedModel, batches: Iterable[Mapping[str, Any]], progress: bool = True):
        self.batches: list[Mapping[str, Any]] = []
        self.known: list[torch.Tensor] = []  # of each part, what models are compared with
        self.measure, self.positions, rows = "", 0, 0
        bar = tqdm(total=POSITIONS, desc="dense", unit="position", disable=not progress, leave=False)
        with evaluating(model), bar:
            for batch in (part for whole in batches for part in parts_of(model, whole)):
                given, labels, measure = read(model, batch)
                if not usable(given).all():
                    raise MoefyError(f"the dense model's predictions are not finite: {OVERFLOW}")
                self.measure = self.measure or measure
                self.batches.append(batch)
                self.known.append(self.compared_with(given, labels))
                rows, self.positions = rows + rows_in(batch), self.positions + len(given)
                bar.update(len(given))
                if rows >= LEAST and (rows >= ROWS or self.positions >= POSITIONS):
                    break
        if not self.positions:
            raise MoefyError("there are no held-out rows to measure quality on, or all their labels are -100")
        if rows < LEAST:
            raise MoefyError(f"{rows} held-out rows are too few to say how sure a quality is: give {LEAST} or more")
        mean = float(torch.cat(self.known).float().mean()) if self.labelled else 1.0
        self.dense = math.exp(-mean) if self.measure == PERPLEXITY else mean
        if not self.dense:
            raise MoefyError("the dense model is right on none of the held-out rows: nothing is relative to that")

    @property
    def labelled(self) -> bool:
        """Return whether models are compared with labels, not with the dense model."""
        return self.measure in (ACCURACY, PERPLEXITY)

    def compared_with(self, given: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
        """Return what is kept of the dense model's logits or hidden states (N, C): its scores (N,) with labels, its
        best guesses (N,) without, or the hidden states."""
        if self.labelled:
            return self.scores(given, labels, given)
        return given if self.measure == COSINE else given.argmax(-1)

    def scores(self, given: torch.Tensor, labels: torch.Tensor | None, known: torch.Tensor) -> torch.Tensor:
        """Return how good a model is at each position (N,): more is better.

        Args:
            given: its logits or hidden states (N, C).
            labels: (N,), or None.
            known: of the dense model, see `compared_with`.
        """
        if self.measure == COSINE:
            return F.cosine_similarity(given, known, -1)
        if labels is not None and self.measure == PERPLEXITY:
            return -F.cross_entropy(given, labels, reduction="none")
        best = given.argmax(-1).masked_fill(~usable(given), -1)
        return (best == (known if labels is None else labels)).float()

    def relative(
        self, model: PreTrainedModel, progress: bool = True, until: Callable[[Relative], bool] = lambda found: False
    ) -> Relative:
        """Compare a model with the dense one, position by position.

        Args:
            model: that is compared.
            progress: whether a bar is shown.
            until: no further rows are read once this is true of what was found.
        """
        sums: list[float] = []
        counts: list[int] = []
        paired = zip(self.batches, self.known, strict=True)
        bar = tqdm(paired, "quality", len(self.known), unit="part", disable=not progress, leave=False)
        with evaluating(model), bar:
            for batch, known in bar:
                given, labels, _ = read(model, batch)
                scores = self.scores(given, labels, known)
                worse = (scores - (known if self.labelled else torch.ones_like(scores))).double()
                alone = len(worse) == rows_in(batch)  # what is compared of a row is independent of other rows alone
                sums += worse.tolist() if alone else [float(worse.sum())]
                counts += [1] * len(worse) if alone else [len(worse)]
                if sum(counts) >= SOON and len(sums) >= LEAST and until(self.summed(sums, counts)):
                    break
        return self.summed(sums, counts)

    def summed(self, sums: Sequence[float], counts: Sequence[int]) -> Relative:
        """Return the quality that differences of scores amount to.

        Args:
            sums: of rows, or of parts with several positions per row.
            counts: positions of each.
        """
        mean, parts = sum(sums) / sum(counts), len(sums)
        off = sum((each - mean * count) ** 2 for each, count in zip(sums, counts, strict=True))
        error = math.sqrt(off * parts / max(parts - 1, 1)) / sum(counts)
        if self.measure == PERPLEXITY:
            value = math.exp(min(-mean, 700))
            return Relative(value, value * error)
        if self.measure != COSINE:  # rows that all agree may be luck: the next one may not
            error = max(error, 1 / sum(counts))
        return Relative(1 + mean / self.dense, error / self.dense)


def parts_of(model: PreTrainedModel, batch: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Return a batch in parts of few rows, whose scatter says how sure a mean is."""
    check_batch(model, batch)
    size, length = rows_in(batch), batch["input_ids"].shape[-1] if "input_ids" in batch else 0
    rows = max(1, TOKENS // length) if length else IMAGES
    tensors = {name: value for name, value in batch.items() if torch.is_tensor(value) and value.shape[:1] == (size,)}
    for start in range(0, size, rows):
        yield {**batch, **{name: value[start : start + rows] for name, value in tensors.items()}}


@torch.no_grad()
def read(model: PreTrainedModel, batch: Mapping[str, Any]) -> tuple[torch.Tensor, torch.Tensor | None, str]:
    """Return logits (N, C) and labels (N,) or None, or hidden states (N, d) and None; and what counts."""
    output = model(**batch)
    if not has_head(output):
        return states(output, dict(batch)).float(), None, COSINE
    logits, labels = counted(model, output, batch)
    if labels is None:
        return logits.float(), None, AGREEMENT
    return logits.float(), labels, PERPLEXITY if is_causal(model) else ACCURACY
