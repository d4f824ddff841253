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
        """Group the tokens of a batch.

        Args:
            text, slots: (T,) of each token; slot -1 where it has none.
        """
        where = (slots >= 0).nonzero()[:, 0]
        codes, pair, counts = (text[where] * num_slots + slots[where]).unique(return_inverse=True, return_counts=True)
        return cls(where, pair, codes // num_slots, codes % num_slots, counts)


@dataclass(frozen=True)
class TextBatch:
    """What all FFNs of a model share about a batch.

    Attributes:
        text, place: (T,) of each token, the row of `ids` it is of, and where it stands there.
        lengths: (B,) tokens of each text.
        ids: (B, S) token ids.
        plain: (T,) bool, false for special tokens.
        groups: tokens by what is tested, under its name.
        labels: class ids (B,) of the texts, under the name of the classes.
    """

    text: torch.Tensor
    place: torch.Tensor
    lengths: torch.Tensor
    ids: torch.Tensor
    plain: torch.Tensor
    groups: dict[str, Groups]
    labels: dict[str, torch.Tensor]

    def shares(self, expert_mask: torch.Tensor) -> torch.Tensor:
        """Return (B, E), the mean over each text's tokens of (T, E): the share of them that use each expert."""
        sums = torch.zeros(len(self.lengths), expert_mask.shape[1]).index_add_(0, self.text, expert_mask)
        return sums / self.lengths[:, None].clamp_min(1)


class SlotSums:
    """Sums over texts for each slot and expert: its use, and what one token drawn from the same text would have.

    See `significance.token_excess`.
    """

    def __init__(self, slots: int, experts: int):
        self.texts = torch.zeros(slots, dtype=torch.float64)
        self.sums = torch.zeros(4, slots, experts, dtype=torch.float64)  # observed, expected, variance, third

    def update_(self, expert_mask: torch.Tensor, shares: torch.Tensor, groups: Groups) -> None:
        """Add a batch: expert_mask (T, E) of 0 and 1, and its `shares` (B, E)."""
        used = torch.zeros(len(groups.counts), expert_mask.shape[1]).index_add_(
            0, groups.pair, expert_mask[groups.where]
        )
        p = shares[groups.text]  # (P, E)
        variance = p * (1 - p)
        for total, value in zip(
            self.sums, (used / groups.counts[:, None], p, variance, variance * (1 - 2 * p)), strict=True
        ):
            total.index_add_(0, groups.slot, value.double())
        self.texts += torch.bincount(groups.slot, minlength=len(self.texts))

    def arguments(self) -> tuple[np.ndarray, ...]:
        """Return the arguments of `significance.token_excess`."""
        return (*self.sums.numpy(), self.texts.numpy())


class ClassSums:
    """Sums over texts of the share of tokens that use each expert, for each class; see `significance.class_excess`."""

    def __init__(self, classes: int, experts: int):
        self.totals = torch.zeros(classes, experts, dtype=torch.float64)
        self.counts = torch.zeros(classes, dtype=torch.float64)
        self.moments = torch.zeros(3, experts, dtype=torch.float64)

    def update_(self, shares: torch.Tensor, labels: torch.Tensor) -> None:
        """Add a batch: shares (B, E), labels (B,)."""
        shares = shares.double()
        self.totals.index_add_(0, labels, shares)
        self.counts += torch.bincount(labels, minlength=len(self.counts))
        self.moments += torch.stack([shares.sum(0), shares.square().sum(0), (shares**3).sum(0)])

    def arguments(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the arguments of `significance.class_excess`."""
        return self.totals.numpy(), self.counts.numpy(), self.moments.numpy()


class UseSums:
    """Sums of which experts of one FFN tokens use, under one way of choosing them.

    Args:
        experts: E.
        slots, classes: how many there are, by name.
    """

    def __init__(self, experts: int, slots: dict[str, int], classes: dict[str, int]):
        self.tokens = 0
        self.pairs = torch.zeros(experts, experts, dtype=torch.float64)  # the diagonal is the load
        self.slots = {name: SlotSums(size, experts) for name, size in slots.items()}
        self.classes = {name: ClassSums(size, experts) for name, size in classes.items()}

    @property
    def load(self) -> np.ndarray:
        """Return (E,), how many tokens use each expert."""
        return self.pairs.diagonal().numpy()

    def update_(self, expert_mask: torch.Tensor, batch: TextBatch) -> None:
        """Add a batch: expert_mask (T, E) float, of 0 and 1."""
        self.tokens += len(expert_mask)
        self.pairs += (expert_mask.t() @ expert_mask).double()
        shares = batch.shares(expert_mask)
        for name, sums in self.slots.items():
            sums.update_(expert_mask, shares, batch.groups[name])
        for name, labels in batch.labels.items():
            self.classes[name].update_(shares, labels)

    def covariance(self) -> np.ndarray:
        """Return (E, E), the covariance over tokens of the use of two experts."""
        mean = self.load / self.tokens
        return self.pairs.numpy() / self.tokens - np.outer(mean, mean)


class NeuronSums:
    """Sums of how often neurons fire, how much in the texts of each class, and of the norms of what experts add."""

    def __init__(self, neurons: int, experts: int, classes: dict[str, int]):
        self.tokens = 0
        self.active = torch.zeros(neurons, dtype=torch.float64)
        self.classes = {name: torch.zeros(size, neurons, dtype=torch.float64) for name, size in classes.items()}
        self.largest, self.norms = torch.zeros(experts), torch.zeros(experts, dtype=torch.float64)

    def update_(self, neurons: torch.Tensor, norms: torch.Tensor, batch: TextBatch) -> None:
        """Add a batch: neurons (T, f), norms (T, E)."""
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

    def update_(self, expert_mask: torch.Tensor, norms: torch.Tensor, batch: TextBatch) -> None:
        """Look at a batch: expert_mask (T, E) float, norms (T, E)."""
        counted = norms.masked_fill((expert_mask == 0) | ~batch.plain[:, None], -torch.inf)
        best = torch.full((len(batch.lengths), expert_mask.shape[1]), -torch.inf)
        best.scatter_reduce_(0, batch.text[:, None].expand_as(counted), counted, "amax")  # (B, E)
        texts = best.topk(min(EXAMPLES, len(best)), dim=0)
        if not (texts.values > self.value.amin(1)).any():
            return
        for expert in (texts.values[0] > self.value.amin(1)).nonzero()[:, 0].tolist():
            for value, row in zip(texts.values[:, expert].tolist(), texts.indices[:, expert].tolist(), strict=True):
                place = int(self.value[expert].argmin())
                if value > self.value[expert, place]:
                    self.put_(expert, place, value, row, expert_mask[:, expert] > 0, batch)

    def put_(self, expert: int, place: int, value: float, row: int, used: torch.Tensor, batch: TextBatch) -> None:
        """Make a text of a batch one of the examples of an expert.

        Args:
            place: of the example that goes.
            value: the largest norm in that text of what the expert adds.
            row: of the text in the batch.
            used: (T,) bool, the tokens that use the expert.
        """
        tokens = batch.text == row
        length = int(batch.lengths[row])
        self.value[expert, place] = value
        self.ids[expert, place] = -1
        self.ids[expert, place, :length] = batch.ids[row, batch.place[tokens]].int()
        self.fired[expert, place] = False
        self.fired[expert, place, :length] = used[tokens]
