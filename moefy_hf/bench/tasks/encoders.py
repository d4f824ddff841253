"""A forward pass of an encoder, with or without a head."""

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F

from ...measure.batches import unlabelled
from ...measure.metrics import Quality, counted
from ..engines.base import Batch, Encoder
from .base import CHECKED_AT_ONCE, SIZES, TRIED, Task, Timed


class Cosine:
    """Running mean of the cosine between a model's hidden states and the dense model's."""

    def __init__(self) -> None:
        self.cosines: list[torch.Tensor] = []

    def update_(self, states: torch.Tensor, dense: torch.Tensor, labels: None) -> None:
        """Add states (N, d)."""
        self.cosines.append(F.cosine_similarity(states, dense, -1))

    def figures(self) -> dict[str, float]:
        return {"cosine": float(torch.cat(self.cosines).mean())}


class EncoderTask(Task):
    """A forward pass: accuracy where classes are known, else how alike best guesses or hidden states are to dense."""

    defaults = {"batch_sizes": SIZES}
    reads = ("input_ids", "pixel_values")

    def read(self) -> None:
        self.labelled = self.inputs.in_batches(self.inputs.rows, CHECKED_AT_ONCE)
        self.sized = {size: self.full_batches(size) for size in self.options["batch_sizes"]}

    @property
    def batches(self) -> list[Batch]:
        return [unlabelled(batch) for batch in self.labelled[:TRIED]]

    def quality(self, running: Mapping[str, Encoder], most: int | None = None) -> tuple[str, dict[str, float]]:
        sums: dict[str, Any] = {}
        for place in self.bar(range(len(self.labelled))[:most]):
            batch = self.labelled[place]
            outputs = {name: model(unlabelled(batch)) for name, model in running.items()}
            reference, labels = self.compared(next(iter(outputs.values())), batch)
            for name, output in outputs.items():
                sums.setdefault(name, Quality() if has_head(output) else Cosine())
                sums[name].update_(self.compared(output, batch)[0], reference, labels)
        found = {name: each.figures() for name, each in sums.items()}
        known = next(iter(found.values()))
        measure = next(name for name in ("accuracy", "agreement", "cosine") if name in known)
        return measure, {name: figures[measure] for name, figures in found.items()}

    def compared(self, output: Mapping[str, Any], batch: Batch) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return logits (N, C) and labels (N,), if there are any; of models without a head hidden states (N, d)."""
        if has_head(output):
            return counted(self.model, SimpleNamespace(**output), batch)
        return states(output, batch), None

    def times(self, running: Mapping[str, Encoder]) -> list[Timed]:
        found = []
        for size, batches in self.sized.items():
            taken = self.turns(f"batches of {size}", running, batches, lambda model, batch: model(batch))
            found.append(Timed("forward", size, self.inputs.amount(batches), taken, self.inputs.unit))
        return found


def has_head(output: Mapping[str, Any]) -> bool:
    """Return whether a model predicts something."""
    return bool({"logits", "start_logits"} & {*output})


def states(output: Mapping[str, Any], batch: Batch) -> torch.Tensor:
    """Return hidden states (N, d), of an output's first tensor (B, L, d) those that are no padding."""
    found = next(iter(output.values()))
    mask = batch.get("decoder_attention_mask", batch.get("attention_mask"))
    return found[mask.bool()] if mask is not None and found.shape[:2] == mask.shape else found.flatten(0, -2)
