"""One conversion of a plan: made on a copy of the model, timed and compared at several budgets."""

import copy
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedModel

from ..bench.models import variants
from ..config import MoEficationConfig
from ..conversion.compensation import compensate_
from ..conversion.convert import moefy_
from ..errors import MoefyError
from ..evaluation.quality_check import share_of
from ..evaluation.search import check_target
from ..loading import check_moefied, routed
from ..measure.profile import ModelProfile
from .clock import Clock, Speed
from .held_out import PERPLEXITY, HeldOut, Relative

COARSE, FINE = 8, 48  # steps of the share of the experts, where speed and where quality is searched
SURE = 3  # standard errors by which a quality is better than what is asked for: of many budgets one looks so by luck
LOWEST = 1 / 16  # of the experts, which no search goes below
CLEAR = 3  # standard errors by which few rows must be beyond that, or short of what is asked for
FAST_ENOUGH = 1.1  # times as fast as dense: less is not worth a conversion


@dataclass(frozen=True)
class Goal:
    """What a conversion must reach.

    Args:
        quality: relative to the dense model: accuracy, agreement or cosine of at least this, in (0, 1]; perplexity of
            at most this, 1 or more. None: whatever it is at the speed.
        speedup: times as fast as the dense model, at least.

    Raises:
        MoefyError: neither is given, or a speed-up of 1 or less.
    """

    quality: float | None = None
    speedup: float | None = None

    def __post_init__(self) -> None:
        if self.quality is None and self.speedup is None:
            raise MoefyError("a plan needs a goal: a quality, or a speed-up")
        if self.speedup is not None and self.speedup <= 1:
            raise MoefyError(f"a speed-up of {self.speedup:g} is no goal: it must be more than 1")

    def check(self, measure: str) -> None:
        """Check that the quality is one of what is measured.

        Raises:
            MoefyError: it is out of range.
        """
        if self.quality is not None:
            check_target(self.quality, measure)

    def fast(self, speed: Speed) -> bool:
        """Return whether a model is fast enough."""
        return speed.ratio >= (self.speedup or FAST_ENOUGH)

    def good(self, found: Relative, measure: str) -> bool:
        """Return whether a quality is enough, whatever the rows that it was measured on."""
        return self.quality is None or self.margin(found, measure) >= SURE

    def clear(self, found: Relative, measure: str) -> bool:
        """Return whether more rows would hardly change what `good` says."""
        return self.quality is None or not -CLEAR < self.margin(found, measure) < SURE + CLEAR

    def margin(self, found: Relative, measure: str) -> float:
        """Return by how many standard errors a quality is better than the one that is asked for."""
        better = found.value - (self.quality or 0)
        better = -better if measure == PERPLEXITY else better
        return better / max(found.error, 1e-12)


@dataclass(frozen=True)
class Row:
    """What was found of a candidate.

    Attributes:
        candidate: its name.
        settings: of `MoEficationConfig`, with the budget that was found.
        experts: share of them that is computed.
        quality: relative to dense.
        speed: beside dense.
        reached: whether this is what was asked for.
        refused: why it could not be tried, else None.
    """

    candidate: str
    settings: MoEficationConfig
    experts: float | None = None
    quality: Relative | None = None
    speed: Speed | None = None
    reached: bool = False
    refused: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return all of it as JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Made:
    """What all trials share: the dense model, which stays as it is, its profile, and what measures others."""

    model: PreTrainedModel
    profile: ModelProfile
    clock: Clock
    held_out: HeldOut
    progress: bool = True


class Trial:
    """A candidate that was made, and is measured at one share of its experts after another.

    Args:
        made: of what, and with what.
        config: how it is converted.

    Raises:
        MoefyError: it cannot be converted so, or does not run in the runtime.
    """

    def __init__(self, made: Made, config: MoEficationConfig):
        copied = copy.deepcopy(made.model)
        moefy_(copied, replace(config, compensation=False), made.profile, progress=made.progress)
        self.masked = check_moefied(copied.eval())
        made.clock.check(self.masked)
        (self.auto,) = variants(self.masked, ("auto",)).values()
        self.profile = made.profile if config.compensation else None
        self.clock, self.held_out, self.progress = made.clock, made.held_out, made.progress
        self.least = 1 / min(routed(site).num_experts for site in self.masked.moe_sites())
        self.speeds: dict[float, Speed] = {}
        self.qualities: dict[float, Relative] = {}
        self.verdicts: dict[float, bool] = {}
        self.at(max(LOWEST, self.least), means=True)  # so that adding means is timed

    def at(self, share: float, means: bool = False) -> None:
        """Compute a share of the experts from here on.

        Args:
            share: of them.
            means: measure what the others contribute, where that is compensated, at this share.
        """
        for model in (self.masked, self.auto):
            model.set_selection(k=share)
        if means and self.profile is not None:
            compensate_(self.masked, self.profile, progress=self.progress)
            for site, other in zip(self.masked.moe_sites(), self.auto.moe_sites(), strict=True):
                if (measured := routed(site).compensation) is not None:
                    routed(other).compensate_(measured)

    def speed(self, share: float) -> Speed:
        """Time the model at a share of the experts."""
        if share not in self.speeds:
            self.at(share)
            self.speeds[share] = self.clock.speed(self.masked, self.auto)
        return self.speeds[share]

    def quality(self, share: float) -> Relative:
        """Compare the model at a share of the experts, on all held-out rows."""
        if share not in self.qualities:
            self.at(share, means=True)
            with torch.inference_mode():
                self.qualities[share] = self.held_out.relative(self.auto, self.progress)
        return self.qualities[share]

    def good(self, share: float, goal: Goal) -> bool:
        """Return whether quality is enough, from as many rows as it takes to see that."""
        if share not in self.verdicts:
            self.at(share, means=True)
            measure = self.held_out.measure
            with torch.inference_mode():
                found = self.held_out.relative(self.auto, self.progress, lambda each: goal.clear(each, measure))
            self.verdicts[share] = goal.good(found, measure)
        return self.verdicts[share]

    def experts(self, share: float) -> float:
        """Return the share of the experts that is computed, where that asked for is not a whole number of them."""
        self.at(share)
        return share_of(self.masked)

    def search(self, goal: Goal) -> tuple[float, bool]:
        """Find the budget: the most experts that are fast enough or, where a quality is asked for, the fewest that are
        good enough, if they are fast enough, too.

        More experts are better and slower. So there is no such budget where one is neither good nor fast enough.

        Returns:
            the share of the experts, and whether the goal is reached there; if not, the most that was tried and is
            fast enough.
        """
        lowest = max(LOWEST, self.least)
        if goal.quality is None:
            if not goal.fast(self.speed(lowest)):
                return lowest, False
            return boundary(lambda share: goal.fast(self.speed(share)), lowest, 1.0, 1 / COARSE), True
        low, high, fastest = lowest, 1.0, lowest
        while high - low > 1 / COARSE:
            middle = (low + high) / 2
            good, fast = self.good(middle, goal), goal.fast(self.speed(middle))
            fastest = max(fastest, middle) if fast else fastest
            if good == fast:
                return (self.fewest(middle, lowest, goal), True) if good else (fastest, False)
            low, high = (low, middle) if good else (middle, high)
        return fastest, self.good(fastest, goal) and goal.fast(self.speed(fastest))

    def fewest(self, enough: float, lowest: float, goal: Goal) -> float:
        """Return the smallest share of the experts that is good enough, from one that is down to the lowest."""
        if self.good(lowest, goal):
            return lowest
        return boundary(lambda share: self.good(share, goal), enough, lowest, 1 / FINE)


def boundary(holds: Callable[[float], bool], inside: float, outside: float, step: float) -> float:
    """Return by bisection how far something holds.

    Args:
        holds: whether it does at a number.
        inside: where it does.
        outside: where it does not, or is not asked.
        step: how near the result comes to where it no longer does.
    """
    while abs(outside - inside) > step:
        middle = (inside + outside) / 2
        inside, outside = (middle, outside) if holds(middle) else (inside, middle)
    return inside
