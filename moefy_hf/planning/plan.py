"""`plan`: try what suits a model, and choose what is fast enough at the quality that is asked for, or nothing."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..bench.timing import hardware
from ..config import MoEficationConfig
from ..conversion.checks import check_convertible
from ..errors import MoefyError
from ..io import markdown
from ..measure.contexts import evaluating
from ..measure.profile import profile
from ..modeling.moefied import is_moefied
from .advice import advice_of
from .candidates import Candidate, candidates_for, config_of
from .clock import Clock, Load
from .held_out import PERPLEXITY, HeldOut, Relative
from .trial import FAST_ENOUGH, SURE, Goal, Made, Row, Trial

HELD_OUT = 4  # every fourth batch, where no others are given
NOT_SURE = "not sure"  # good enough, but not by so much that other rows would say so, too
TOKENS = 16_384  # that are calibrated on: enough to compare candidates


@dataclass(frozen=True)
class Plan:
    """What `plan` found.

    Attributes:
        rows: one per candidate.
        chosen: the one that is best, or None where none reaches the goal.
        goal, load: what was asked for, and what was timed.
        measure, dense, positions: what quality is, the dense model's own, and on how many positions.
        validated: whether they were given as `validation`.
        hardware: that it was timed on.
        advice: what could be done instead, where none is chosen.

    Example:
        >>> found = plan(model, batches, quality=0.99)
        >>> print(found.table(), found.line(), sep="\\n")
        >>> if found.chosen:
        ...     moefy_(model, found.chosen.settings, batches)
    """

    rows: list[Row]
    chosen: Row | None
    goal: Goal
    load: Load
    measure: str
    dense: float
    positions: int
    validated: bool
    hardware: str
    advice: list[str]

    def table(self) -> str:
        """Return a Markdown table, a line per candidate."""
        lines = []
        for row in self.rows:
            cells: dict[str, Any] = {"candidate": row.candidate, "experts of": row.settings.expert_size}
            if row.refused:
                cells |= {"computed": "", self.title: "", "times dense": "", "": row.refused}
            elif row.quality and row.speed:
                cells["computed"] = f"{row.experts:.0%}"
                cells[self.title] = shown(row.quality)
                cells["times dense"] = "{:.2f} ({:.2f} to {:.2f})".format(row.speed.ratio, *row.speed.spread)
                cells[""] = "chosen" if row is self.chosen else self.verdict(row)
            lines.append(cells)
        return markdown(lines)

    def verdict(self, row: Row) -> str:
        """Return whether a candidate reached the goal, in words."""
        if row.reached:
            return "reached"
        assert row.speed and row.quality  # those of a row that was tried
        near = self.goal.good(Relative(row.quality.value, 0.0), self.measure)
        return NOT_SURE if near and self.goal.fast(row.speed) else "not reached"

    @property
    def title(self) -> str:
        """Return what quality is called."""
        return self.measure if self.measure in ("agreement", "cosine") else f"{self.measure} of dense"

    def line(self) -> str:
        """Return in words what was chosen and why, or that nothing was, and what could be done instead."""
        dense = f"dense {self.measure} {self.dense:.4g} on {self.positions:,} held-out positions; {self.timed()}"
        if not self.validated:
            dense += ". They are of the data that was fitted on: a model that was trained on it looks better there"
        if self.chosen is None:
            sure = "surely " if any(self.verdict(row) == NOT_SURE for row in self.rows if row.speed) else ""
            return "\n".join([f"{dense}. Nothing here {sure}{self.asked()}.", *(f"- {each}" for each in self.advice)])
        row, others = self.chosen, sum(each.reached for each in self.rows) - 1
        best = "the fastest" if self.goal.quality is not None else "the best"
        why = f"{best} of {others + 1} that reach the goal" if others else "the only one that reaches the goal"
        assert row.speed and row.quality  # those of a row that was tried
        return (
            f"{dense}. Chosen: {row.candidate} at {row.experts:.0%} of the experts, {row.speed.ratio:.2f} times as "
            f"fast at {shown(row.quality)} of dense; {why}."
        )

    def asked(self) -> str:
        """Return what was asked for."""
        speed = f"is {self.goal.speedup or FAST_ENOUGH:g} times as fast as dense in {self.load.runtime}"
        if self.goal.quality is None:
            return speed
        at = "at most" if self.measure == PERPLEXITY else "at least"
        return f"{speed} and keeps {at} {self.goal.quality:g} of the dense {self.measure}"

    def timed(self) -> str:
        """Return what was timed."""
        threads = f"{self.load.threads} thread{'s' if self.load.threads > 1 else ''}"
        return f"timed in {self.load.runtime}, batches of {self.load.batch}, {threads}, {self.hardware}"

    def speed(self) -> dict[str, Any] | None:
        """Return how fast the chosen one is, for a checkpoint's facts."""
        if self.chosen is None or self.chosen.speed is None:
            return None
        load, speed = self.load, self.chosen.speed
        row = {"runtime": load.runtime, "batch": load.batch, "threads": load.threads, "times dense": speed.ratio}
        return {"hardware": self.hardware, "rows": [row | {"ms": speed.milliseconds}]}

    def to_dict(self) -> dict[str, Any]:
        """Return all figures as JSON."""
        left = {name: value for name, value in vars(self).items() if name not in ("rows", "chosen", "goal", "load")}
        chosen = self.chosen and self.chosen.candidate
        rows = [row.to_dict() for row in self.rows]
        return left | {"goal": asdict(self.goal), "load": asdict(self.load), "rows": rows, "chosen": chosen}


def plan(
    model: PreTrainedModel,
    data: Iterable[Mapping[str, Any]],
    validation: Iterable[Mapping[str, Any]] | None = None,
    *,
    quality: float | None = None,
    speedup: float | None = None,
    load: Load | None = None,
    config: MoEficationConfig | None = None,
    candidates: Sequence[Candidate] | None = None,
    progress: bool = True,
) -> Plan:
    """Find the conversion that is fastest at a quality, or best at a speed, on this machine; the model stays as it is.

    Each candidate is made on a copy of the model from one profile. The most experts that are fast enough are found
    first: where they are not good enough, fewer are not, either. Then the fewest that are good enough are found.
    Quality must be reached by three standard errors.

    Args:
        data: model-ready batches that splits and routers are fitted on, with labels if there are any.
        validation: others that quality is measured on, and whose rows are timed; every fourth of `data` by default,
            which is fitted on the others then. Rows that the model was trained on flatter it.
        quality: relative to the dense model: of at least this, in (0, 1], where accuracy (with labels), agreement of
            best guesses (without) or the cosine of hidden states (without a head) counts; of at most this, 1 or more,
            where perplexity does (language models with labels).
        speedup: times as fast as dense, at least; 1.1 where a quality is given alone.
        load: what is timed; one text at once in PyTorch on all of torch's threads by default.
        config: what is converted (`towers`, `layers`), `allocation`, `seed` and `calibration_tokens` (16,384 by
            default).
        candidates: what is tried, instead of what suits the model.

    Raises:
        MoefyError: no goal, one out of range, a model that no candidate can convert or that is not on the CPU, or data
            that do not suit it.

    Example:
        >>> found = plan(model, batches, quality=0.99, load=Load(batch=32))
        >>> print(found.table())
    """
    goal, config = Goal(quality, speedup), config or MoEficationConfig(calibration_tokens=TOKENS)
    load = load or Load(threads=torch.get_num_threads())
    tried, refused = settings_of(model, config, candidates, data)
    fitted, held = (data, validation) if validation is not None else parted(list(data))
    with evaluating(model):
        held_out = HeldOut(model, held, progress)
        goal.check(held_out.measure)
        clock = Clock(load, model, held_out.batches, progress)
        which: dict[str, Any] = {"towers": config.towers, "layers": config.layers, "progress": progress}
        bar = tqdm(tried.items(), "candidates", disable=not progress, leave=False)
        with profile(model, fitted, max_tokens=config.calibration_tokens, **which) as found:
            made = Made(model, found, clock, held_out, progress)
            rows = [tried_row(made, name, settings, goal) for name, settings in bar] + refused
        check_tried(rows)
        chosen = best_of(rows, goal, held_out.measure)
        advice = [] if chosen else advice_of(model, clock, config)
    measured = held_out.measure, held_out.dense, held_out.positions, validation is not None
    return Plan(rows, chosen, goal, load, *measured, hardware(), advice)


def settings_of(
    model: PreTrainedModel,
    config: MoEficationConfig,
    candidates: Sequence[Candidate] | None,
    data: Iterable[Mapping[str, Any]],
) -> tuple[dict[str, MoEficationConfig], list[Row]]:
    """Return how each candidate is converted, and a row for each that cannot be.

    Raises:
        MoefyError: the model cannot be converted at all.
    """
    if model.device.type != "cpu":
        raise MoefyError(f"plans are timed on the CPU, the model is on {model.device}: model.to('cpu')")
    if is_moefied(model):
        check_convertible(model, config, data)
    tried: dict[str, MoEficationConfig] = {}
    refused = []
    for each in candidates_for(model, config) if candidates is None else candidates:
        settings = config_of(each, model, config, 1.0)
        try:
            check_convertible(model, settings, data)
        except MoefyError as error:
            refused.append(Row(each.name, settings, refused=str(error)))
        else:
            if settings not in tried.values():  # of a small model two sizes may be one
                tried[each.name] = settings
    if not tried:
        check_tried(refused)
    return tried, refused


def check_tried(rows: Sequence[Row]) -> None:
    """Check that something was tried.

    Raises:
        MoefyError: nothing was; says why.
    """
    if all(row.refused for row in rows):
        reasons = dict.fromkeys(f"{row.candidate}: {row.refused}" for row in rows)
        raise MoefyError(f"no candidate could be tried: {'; '.join(reasons)}")


def shown(quality: Relative) -> str:
    """Return a quality and how sure it is."""
    return f"{quality.value:.4f} ± {SURE * quality.error:.4f}"


def parted(batches: list[Mapping[str, Any]]) -> tuple[list[Mapping[str, Any]], list[Mapping[str, Any]]]:
    """Return batches to fit on, and those to hold out.

    Raises:
        MoefyError: there are too few.
    """
    if len(batches) < HELD_OUT:
        raise MoefyError(f"{len(batches)} batches are too few to hold some out: give `validation`, or more")
    return [batch for place, batch in enumerate(batches) if place % HELD_OUT], batches[::HELD_OUT]


def tried_row(made: Made, name: str, settings: MoEficationConfig, goal: Goal) -> Row:
    """Try one candidate; whatever its runtime or its settings do not allow is said in its row."""
    try:
        trial = Trial(made, settings)
        share, reached = trial.search(goal)
        speed, quality = trial.speed(share), trial.quality(share)
    except MoefyError as error:
        return Row(name, settings, refused=str(error))
    reached = reached and goal.fast(speed) and goal.good(quality, made.held_out.measure)
    return Row(name, replace(settings, k=share), trial.experts(share), quality, speed, reached)


def best_of(rows: Sequence[Row], goal: Goal, measure: str) -> Row | None:
    """Return the fastest of the rows that reach a quality, or the best of those that reach a speed."""

    def merit(row: Row) -> float:
        assert row.speed and row.quality
        if goal.quality is not None:
            return row.speed.ratio
        return -row.quality.value if measure == PERPLEXITY else row.quality.value

    return max((row for row in rows if row.reached), key=merit, default=None)
