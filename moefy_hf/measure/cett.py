"""How sparse FFNs are, for any activation: exact zeros, and what may be dropped at little error (Sparsing Law, 2024).

A neuron is dropped on a token where the norm of what it adds to the output, |a_n| |down[:, n]|, does not exceed a
threshold of its layer. A layer's CETT (cumulative errors of tail truncation) is the mean over tokens of |what the
dropped neurons would have added| / |FFN(x)|, biases left out; its activation ratio is the share of neurons kept.
"""

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from tqdm.auto import tqdm, trange
from transformers import PreTrainedModel

from ..modeling.ffn_sites import FfnSite, find_sites
from .metrics import Quality, is_causal, predictions
from .profile import observed, real_tokens

LEVELS = (0.01, 0.05, 0.1, 0.2)  # of CETT, at which activation ratios are shown
GRID = 24  # thresholds per layer that are measured; others are interpolated
FIRST = 512  # tokens of the first batch that decide where they lie


@dataclass(frozen=True)
class CettCurve:
    """One FFN at rising thresholds, from one that drops nothing but zeros to one that drops every neuron.

    Attributes:
        zeros: share of activations that are exactly zero.
        thresholds, cett, active: of each point the threshold, the CETT, and the share of neurons kept.
    """

    tokens: int
    zeros: float
    thresholds: tuple[float, ...]
    cett: tuple[float, ...]
    active: tuple[float, ...]

    def at(self, cett: float) -> tuple[float, float]:
        """(threshold, share of neurons kept) at a CETT; between measured points by interpolation.

        Raises:
            ValueError: it is not between 0 and 1.
        """
        if not 0 <= cett <= 1:
            raise ValueError(f"cett={cett} must lie between 0 and 1")
        points = list(zip(self.cett, self.thresholds, self.active, strict=True))
        for (low, *below), (high, *above) in pairwise(points):
            if low <= cett < high:
                part = (cett - low) / (high - low)
                threshold, active = (a + part * (b - a) for a, b in zip(below, above, strict=True))
                return threshold, active
        return points[-1][1:] if cett >= self.cett[-1] else points[0][1:]


class _Measured:
    """Running sums of one FFN."""

    def __init__(self, site: FfnSite):
        self.down = site.weights().down.detach()
        self.norms = self.down.float().norm(dim=0)  # (f,)
        self.tokens = 0
        self.zeros = 0.0
        self.largest = 0.0
        self.thresholds = torch.zeros(0)
        self.cett, self.active = (torch.zeros(GRID + 1, dtype=torch.float64) for _ in range(2))

    def update_(self, neurons: torch.Tensor) -> None:
        """neurons (T, f)"""
        scores = neurons.float().abs() * self.norms
        if not len(self.thresholds):
            self.thresholds = grid_of(scores[:FIRST])
        bucket = torch.bucketize(scores, self.thresholds)  # how many thresholds lie below a neuron's score
        whole = F.linear(neurons, self.down).float()
        norm = whole.norm(dim=-1).clamp_min(1e-12)
        dropped = torch.zeros_like(whole)
        for point in range(1, len(self.thresholds)):  # what each threshold drops beyond the one before
            dropped += F.linear(neurons.masked_fill(bucket != point, 0), self.down).float()
            self.cett[point] += float((dropped.norm(dim=-1) / norm).sum())
            self.active[point] += int((bucket > point).sum())
        self.active[0] += int((bucket > 0).sum())
        self.tokens += len(neurons)
        self.largest = max(self.largest, float(scores.max()))
        self.zeros += int((neurons == 0).sum())

    def curve(self) -> CettCurve:
        points, count = len(self.thresholds), self.tokens * len(self.norms)
        cett = (self.cett[:points] / self.tokens).cummax(0).values.tolist()
        active = (self.active[:points] / count).tolist()
        thresholds = (*self.thresholds.tolist(), self.largest)
        return CettCurve(self.tokens, self.zeros / count, thresholds, (*cett, max(1.0, cett[-1])), (*active, 0.0))


def grid_of(scores: torch.Tensor) -> torch.Tensor:
    """(T, f) -> (G,): 0 and rising quantiles of what is not zero, closest together among the large."""
    drawn = scores[scores > 0].sort().values
    if not len(drawn):
        return scores.new_zeros(1)
    ranks = 1 - (1 - torch.linspace(0, 1, GRID + 1, device=scores.device)[1:-1]).square()
    return torch.cat([scores.new_zeros(1), drawn[(ranks * (len(drawn) - 1)).long()].unique()])


@torch.no_grad()
def cett_curves(
    model: PreTrainedModel, batches: Iterable[Mapping[str, Any]], *, max_tokens: int = 4096, progress: bool = True
) -> list[CettCurve]:
    """Measure every FFN of a model in one pass over some thousand tokens, one curve each, in forward order. Memory
    does not grow with their number.

    Raises:
        ValueError: unsupported model type, or no token in `batches`.
    """
    sites = find_sites(model)
    found = [_Measured(site) for site in sites]

    def seen(position: int, x: torch.Tensor, neurons: torch.Tensor, text: torch.Tensor) -> None:
        neurons = neurons[: max_tokens - found[position].tokens]
        if len(neurons):
            found[position].update_(neurons)

    bar = tqdm(total=max_tokens, unit="token", unit_scale=True, desc="CETT", disable=not progress)
    with bar, observed(model, sites, seen) as run:
        for batch in batches:
            run(batch)
            tokens = max(each.tokens for each in found)
            bar.update(tokens - bar.n)
            if tokens >= max_tokens:
                break
    if not all(each.tokens for each in found):
        raise ValueError("there is nothing to measure: no batch held a token that is not padding")
    return [each.curve() for each in found]


@contextlib.contextmanager
def dropping(
    model: PreTrainedModel, thresholds: Sequence[float], batch: Mapping[str, Any], counts: torch.Tensor
) -> Iterator[None]:
    """Drop neurons below each FFN's threshold; counts (FFNs, 2) gains how many were kept, of how many."""

    def drop(position: int, site: FfnSite, args: tuple) -> tuple:
        keep = args[0].float().abs() * site.weights().down.float().norm(dim=0) > thresholds[position]
        rows = keep.reshape(-1, keep.shape[-1])
        real = real_tokens(model, site, batch, len(rows))
        rows = rows if real is None else rows[real]
        counts[position] += torch.tensor([int(rows.sum()), rows.numel()])
        return args[0].masked_fill(~keep, 0), *args[1:]

    handles = [
        site.down.register_forward_pre_hook(lambda _, args, i=position, site=site: drop(i, site, args))
        for position, site in enumerate(find_sites(model))
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class PplActivation:
    """The sparsest a model gets by dropping neurons at one CETT everywhere, within a growth of its perplexity.

    Attributes:
        active: share of neurons kept, of each FFN, where `growth` was measured.
        quality: "perplexity", or "loss" of what is no language model, whose relative growth was limited.
    """

    cett: float
    growth: float
    active: tuple[float, ...]
    quality: str


@torch.no_grad()
def ppl_activation(
    model: PreTrainedModel,
    batches: Iterable[Mapping[str, Any]],
    curves: Sequence[CettCurve],
    growth: float = 0.01,
    *,
    tolerance: float = 1e-3,
    progress: bool = True,
) -> PplActivation:
    """PPL-p%: bisect one CETT for all FFNs until perplexity (or another task's loss) has grown by `growth`.

    Args:
        batches: with labels; read once for each of some ten steps.
        curves: of this model, from `cett_curves`.
        tolerance: of the CETT.

    Raises:
        ValueError: a growth or tolerance out of range, curves of another model, or no labels.
    """
    if not (growth > 0 and 0 < tolerance < 1):
        raise ValueError(f"growth must be positive and tolerance between 0 and 1, got {growth} and {tolerance}")
    if len(curves) != len(find_sites(model)):
        raise ValueError(f"there are {len(curves)} curves for {len(find_sites(model))} FFNs")
    quality, training = "perplexity" if is_causal(model) else "loss", model.training

    def measured(cett: float) -> tuple[float, torch.Tensor]:
        """The loss at a CETT, and how many neurons of each FFN were kept, of how many."""
        thresholds = [curve.at(cett)[0] for curve in curves]
        counts, sums = torch.zeros(len(curves), 2, dtype=torch.float64), Quality()
        for batch in batches:
            with dropping(model, thresholds, batch, counts):
                logits, labels = predictions(model, batch)
            sums.update_(logits, logits, labels)
        if not sums.labelled:
            raise ValueError("perplexity or loss needs labels: `batches` is empty or has none")
        return sums.loss / sums.labelled, counts

    low, high = 0.0, 1.0
    model.eval()
    try:
        dense, counts = measured(low)  # without exact zeros alone: what the dense model does
        found = (low, 0.0, counts)
        for _ in trange(math.ceil(-math.log2(tolerance)), desc="PPL", unit="pass", disable=not progress):
            cett = (low + high) / 2
            loss, counts = measured(cett)
            grown = math.expm1(min(loss - dense, 50)) if quality == "perplexity" else loss / dense - 1
            if grown <= growth:
                low, found = cett, (cett, grown, counts)
            else:
                high = cett
    finally:
        model.train(training)
    return PplActivation(found[0], found[1], tuple((found[2][:, 0] / found[2][:, 1]).tolist()), quality)
