"""Streaming sums over the tokens of many texts, of a size that does not depend on their number.

Symbols: T tokens and B texts of one batch, E experts, C classes, M slots (kinds of tokens), f neurons.
"""

from dataclasses import dataclass

import numpy as np
import torch

EXAMPLES = 3  # texts kept per expert


@dataclass(frozen=True)
class Groups:
    """Tokens of a batch by text and slot; every (text, slot) that occurs is a pair.

    Attributes:
        where: (t,) the tokens that have a slot.
        pair: (t,) the pair each of them is of.
        text, slot: (P,) of each pair.
        counts: (P,) tokens of each pair.
    """

    where: torch.Tensor
    pair: torch.Tensor
    text: torch.Tensor
    slot: torch.Tensor
    counts: torch.Tensor

    @classmethod
    def of(cls, text: torch.Tensor, slots: torch.Tensor, num_slots: int) -> "Groups":
        """text (T,), slots (T,): -1 where a token has none."""
        where = (slots >= 0).nonzero()[:, 0]
        codes, pair, counts = (text[where] * num_slots + slots[where]).unique(return_inverse=True, return_counts=True)
        return cls(where, pair, codes // num_slots, codes % num_slots, counts)


@dataclass(frozen=True)
class TextBatch:
    """What all FFNs of a model share about a batch: the text of each token (T,), its place in `ids`, texts' lengths
    (B,), token ids and mask (B, S), tokens grouped by what is tested, and texts' class ids (B,) by name."""

    text: torch.Tensor
    place: torch.Tensor
    lengths: torch.Tensor
    ids: torch.Tensor
    plain: torch.Tensor
    groups: dict[str, Groups]
    labels: dict[str, torch.Tensor]

    def shares(self, keep: torch.Tensor) -> torch.Tensor:
        """(T, E) -> (B, E): mean over each text's tokens, that is the share of them that use each expert."""
        sums = torch.zeros(len(self.lengths), keep.shape[1]).index_add_(0, self.text, keep)
        return sums / self.lengths[:, None].clamp_min(1)


class SlotSums:
    """For each slot and expert, sums over texts: use, and what one token drawn from the same text would have; see
    `statistics.token_excess`."""

    def __init__(self, slots: int, experts: int):
        self.texts = torch.zeros(slots, dtype=torch.float64)
        self.sums = torch.zeros(4, slots, experts, dtype=torch.float64)  # observed, expected, variance, third

    def update_(self, keep: torch.Tensor, shares: torch.Tensor, groups: Groups) -> None:
        """keep (T, E) of 0 and 1, shares (B, E)."""
        used = torch.zeros(len(groups.counts), keep.shape[1]).index_add_(0, groups.pair, keep[groups.where])
        p = shares[groups.text]  # (P, E)
        variance = p * (1 - p)
        for total, value in zip(
            self.sums, (used / groups.counts[:, None], p, variance, variance * (1 - 2 * p)), strict=True
        ):
            total.index_add_(0, groups.slot, value.double())
        self.texts += torch.bincount(groups.slot, minlength=len(self.texts))

    def arguments(self) -> tuple[np.ndarray, ...]:
        """Those of `statistics.token_excess`."""
        return (*self.sums.numpy(), self.texts.numpy())


class ClassSums:
    """For each class and expert, the summed share of tokens that use it; see `statistics.class_excess`."""

    def __init__(self, classes: int, experts: int):
        self.totals = torch.zeros(classes, experts, dtype=torch.float64)
        self.counts = torch.zeros(classes, dtype=torch.float64)
        self.moments = torch.zeros(3, experts, dtype=torch.float64)

    def update_(self, shares: torch.Tensor, labels: torch.Tensor) -> None:
        """shares (B, E), labels (B,)"""
        shares = shares.double()
        self.totals.index_add_(0, labels, shares)
        self.counts += torch.bincount(labels, minlength=len(self.counts))
        self.moments += torch.stack([shares.sum(0), shares.square().sum(0), (shares**3).sum(0)])

    def arguments(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Those of `statistics.class_excess`."""
        return self.totals.numpy(), self.counts.numpy(), self.moments.numpy()


class UseSums:
    """Which experts of one FFN tokens use, under one way of choosing them."""

    def __init__(self, experts: int, slots: dict[str, int], classes: dict[str, int]):
        self.tokens = 0
        self.pairs = torch.zeros(experts, experts, dtype=torch.float64)  # the diagonal is the load
        self.slots = {name: SlotSums(size, experts) for name, size in slots.items()}
        self.classes = {name: ClassSums(size, experts) for name, size in classes.items()}

    @property
    def load(self) -> np.ndarray:
        """(E,) tokens that use each expert."""
        return self.pairs.diagonal().numpy()

    def update_(self, keep: torch.Tensor, batch: TextBatch) -> None:
        """keep (T, E) float, of 0 and 1."""
        self.tokens += len(keep)
        self.pairs += (keep.t() @ keep).double()
        shares = batch.shares(keep)
        for name, sums in self.slots.items():
            sums.update_(keep, shares, batch.groups[name])
        for name, labels in batch.labels.items():
            self.classes[name].update_(shares, labels)

    def covariance(self) -> np.ndarray:
        mean = self.load / self.tokens
        return self.pairs.numpy() / self.tokens - np.outer(mean, mean)


class NeuronSums:
    """How often neurons fire, how much in the texts of each class, and how large what experts add gets."""

    def __init__(self, neurons: int, experts: int, classes: dict[str, int]):
        self.tokens = 0
        self.active = torch.zeros(neurons, dtype=torch.float64)
        self.classes = {name: torch.zeros(size, neurons, dtype=torch.float64) for name, size in classes.items()}
        self.largest, self.norms = torch.zeros(experts), torch.zeros(experts, dtype=torch.float64)

    def update_(self, neurons: torch.Tensor, norms: torch.Tensor, batch: TextBatch) -> None:
        """neurons (T, f), norms (T, E)"""
        self.tokens += len(neurons)
        self.active += (neurons > 0).sum(0)
        self.largest = torch.maximum(self.largest, norms.amax(0))
        self.norms += norms.sum(0)
        if self.classes:
            means = batch.shares(neurons).double()  # (B, f)
            for name, labels in batch.labels.items():
                self.classes[name].index_add_(0, labels, means)


class Examples:
    """The texts in which each expert is used and adds most, with the tokens that use it; one token per text decides.

    Attributes:
        value: (E, EXAMPLES) the largest output norm, -inf where no text was found.
        ids, fired: (E, EXAMPLES, S) token ids, -1 beyond the text, and which of them use the expert.
    """

    def __init__(self, experts: int, length: int):
        self.value = torch.full((experts, EXAMPLES), -torch.inf)
        self.ids = torch.full((experts, EXAMPLES, length), -1, dtype=torch.int32)
        self.fired = torch.zeros(experts, EXAMPLES, length, dtype=torch.bool)

    def update_(self, keep: torch.Tensor, norms: torch.Tensor, batch: TextBatch) -> None:
        """keep (T, E) float, norms (T, E)"""
        counted = norms.masked_fill((keep == 0) | ~batch.plain[:, None], -torch.inf)
        best = torch.full((len(batch.lengths), keep.shape[1]), -torch.inf)
        best.scatter_reduce_(0, batch.text[:, None].expand_as(counted), counted, "amax")  # (B, E)
        texts = best.topk(min(EXAMPLES, len(best)), dim=0)
        if not (texts.values > self.value.amin(1)).any():
            return
        for expert in (texts.values[0] > self.value.amin(1)).nonzero()[:, 0].tolist():
            for value, row in zip(texts.values[:, expert].tolist(), texts.indices[:, expert].tolist(), strict=True):
                place = int(self.value[expert].argmin())
                if value > self.value[expert, place]:
                    self.put_(expert, place, value, row, keep[:, expert] > 0, batch)

    def put_(self, expert: int, place: int, value: float, row: int, used: torch.Tensor, batch: TextBatch) -> None:
        mine = batch.text == row
        length = int(batch.lengths[row])
        self.value[expert, place] = value
        self.ids[expert, place] = -1
        self.ids[expert, place, :length] = batch.ids[row, batch.place[mine]].int()
        self.fired[expert, place] = False
        self.fired[expert, place, :length] = used[mine]
