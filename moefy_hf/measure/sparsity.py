"""How sparse FFNs are, for any activation: exact zeros, and what may be dropped at little error (Sparsing Law, 2024).

A neuron is dropped on a token where the norm of what it adds to the output, |a_n| |down[:, n]|, does not exceed a
threshold of its layer. A layer's CETT (cumulative errors of tail truncation) is the mean over tokens of |what the
dropped neurons would have added| / |FFN(x)|, biases left out; its activation ratio is the share of neurons kept.
`moefy profile` prints the table of `sparsity_table`.
"""

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..errors import MoefyError
from ..modeling.ffn_sites import FfnSite, find_sites
from .contexts import evaluating, hooked
from .hooks import run_with_hooks
from .metrics import Quality, is_causal, predictions
from .padding import without_padding
from .progress import token_bar

LEVELS = (0.01, 0.05, 0.1, 0.2)  # of CETT, at which activation ratios are shown
GRID = 24  # thresholds per layer that are measured; others are interpolated
AT_ONCE = 512  # tokens that are measured at once; the first of them decide where thresholds lie


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
        """Return (threshold, share of neurons kept) at a CETT; between measured points by interpolation.

        Raises:
            MoefyError: it is not between 0 and 1.
        """
        if not 0 <= cett <= 1:
            raise MoefyError(f"cett={cett} must lie between 0 and 1")
        points = list(zip(self.cett, self.thresholds, self.active, strict=True))
        for (low, *below), (high, *above) in pairwise(points):
            if low <= cett < high:
                part = (cett - low) / (high - low)
                threshold, active = (a + part * (b - a) for a, b in zip(below, above, strict=True))
                return threshold, active
        return points[-1][1:] if cett >= self.cett[-1] else points[0][1:]


class _Sums:
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
        """Add tokens: neurons (T, f)."""
        scores = neurons.float().abs() * self.norms
        if not len(self.thresholds):
            self.thresholds = grid_of(scores)
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
        """Return the curve of all tokens so far, with CETT made to rise."""
        points, count = len(self.thresholds), self.tokens * len(self.norms)
        cett = (self.cett[:points] / self.tokens).cummax(0).values.tolist()
        active = (self.active[:points] / count).tolist()
        thresholds = (*self.thresholds.tolist(), self.largest)
        return CettCurve(self.tokens, self.zeros / count, thresholds, (*cett, max(1.0, cett[-1])), (*active, 0.0))


def grid_of(scores: torch.Tensor) -> torch.Tensor:
    """Return thresholds (G,) for scores (T, f): 0 and rising quantiles of what is not zero, closest together among the
    large."""
    positive = scores[scores > 0].sort().values
    if not len(positive):
        return scores.new_zeros(1)
    ranks = 1 - (1 - torch.linspace(0, 1, GRID + 1, device=scores.device)[1:-1]).square()
    return torch.cat([scores.new_zeros(1), positive[(ranks * (len(positive) - 1)).long()].unique()])


@torch.no_grad()
def cett_curves(
    model: PreTrainedModel,
    batches: Iterable[Mapping[str, Any]],
    *,
    max_tokens: int = 4096,
    towers: str | Sequence[str] | None = None,
    progress: bool = True,
) -> list[CettCurve]:
    """Measure every FFN of a model in one pass over some thousand tokens.

    Memory does not grow with their number.

    Args:
        towers: parts of a composite model, see `MoEficationConfig`.

    Returns:
        one curve per FFN, in forward order.

    Raises:
        MoefyError: unsupported model type, or no token in `batches`.
    """
    sites = find_sites(model, towers)
    sums = [_Sums(site) for site in sites]

    def see(position: int, x: torch.Tensor, neurons: torch.Tensor, text: torch.Tensor) -> None:
        for rows in neurons[: max_tokens - sums[position].tokens].split(AT_ONCE):
            if len(rows):
                sums[position].update_(rows)
                bar.update(len(rows) / len(sites))

    with token_bar(max_tokens, "CETT", progress) as bar, run_with_hooks(model, sites, see) as run:
        for batch in batches:
            run(batch)
            if max(ffn.tokens for ffn in sums) >= max_tokens:
                break
    if not all(ffn.tokens for ffn in sums):
        raise MoefyError("there is nothing to measure: no batch held a token that is not padding")
    return [ffn.curve() for ffn in sums]


@contextlib.contextmanager
def dropping(
    model: PreTrainedModel,
    sites: Sequence[FfnSite],
    thresholds: Sequence[float],
    batch: Mapping[str, Any],
    counts: torch.Tensor,
) -> Iterator[None]:
    """Drop the neurons below each FFN's threshold while a batch runs.

    Args:
        sites: the FFNs.
        thresholds: one per FFN.
        counts: (FFNs, 2), which gains how many neurons were kept, and of how many, padding left out.
    """

    def drop(position: int, site: FfnSite, args: tuple) -> tuple:
        keep = args[0].float().abs() * site.weights().down.float().norm(dim=0) > thresholds[position]
        rows = without_padding(model, site, batch, keep)
        counts[position] += torch.tensor([int(rows.sum()), rows.numel()])
        return args[0].masked_fill(~keep, 0), *args[1:]

    with hooked(
        site.down.register_forward_pre_hook(lambda _, args, i=position, site=site: drop(i, site, args))
        for position, site in enumerate(sites)
    ):
        yield


def loss_when_dropping(
    model: PreTrainedModel,
    sites: Sequence[FfnSite],
    batches: Iterable[Mapping[str, Any]],
    thresholds: Sequence[float],
    bar: tqdm,
) -> tuple[float, torch.Tensor]:
    """Return the mean loss of a model whose neurons are dropped below each FFN's threshold, and counts (FFNs, 2) of
    the neurons that were kept, and of all.

    Args:
        bar: moves with each batch.

    Raises:
        MoefyError: `batches` have no labels.
    """
    counts, quality = torch.zeros(len(thresholds), 2, dtype=torch.float64), Quality()
    for batch in batches:
        with dropping(model, sites, thresholds, batch, counts):
            logits, labels = predictions(model, batch)
        quality.update_(logits, logits, labels)
        bar.update()
    if not quality.labelled:
        raise MoefyError("perplexity or loss needs labels: `batches` is empty or has none")
    return quality.loss / quality.labelled, counts


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
    towers: str | Sequence[str] | None = None,
    progress: bool = True,
) -> PplActivation:
    """Bisect one CETT for all FFNs until perplexity (or another task's loss) has grown by `growth`: PPL-p% (Sparsing
    Law, 2024).

    Args:
        batches: with labels; read once for each of some ten steps.
        curves: of this model, from `cett_curves`.
        tolerance: of the CETT.
        towers: that the curves are of.

    Raises:
        MoefyError: a growth or tolerance out of range, curves of another model, or no labels.
    """
    if not (growth > 0 and 0 < tolerance < 1):
        raise MoefyError(f"growth must be positive and tolerance between 0 and 1, got {growth} and {tolerance}")
    if len(curves) != len(sites := find_sites(model, towers)):
        raise MoefyError(f"there are {len(curves)} curves for {len(sites)} FFNs")
    quality, steps = "perplexity" if is_causal(model) else "loss", math.ceil(-math.log2(tolerance))
    total = (steps + 1) * len(batches) if isinstance(batches, Sequence) else None
    with evaluating(model), tqdm(total=total, desc="PPL", unit="batch", disable=not progress) as bar:

        def measure(cett: float) -> tuple[float, torch.Tensor]:
            return loss_when_dropping(model, sites, batches, [curve.at(cett)[0] for curve in curves], bar)

        low, high = 0.0, 1.0
        dense, counts = measure(low)  # without exact zeros alone: what the dense model does
        grown_at_low, counts_at_low = 0.0, counts
        for _ in range(steps):
            cett = (low + high) / 2
            loss, counts = measure(cett)
            grown = math.expm1(min(loss - dense, 50)) if quality == "perplexity" else loss / dense - 1
            if grown <= growth:
                low, grown_at_low, counts_at_low = cett, grown, counts
            else:
                high = cett
    return PplActivation(low, grown_at_low, tuple((counts_at_low[:, 0] / counts_at_low[:, 1]).tolist()), quality)
