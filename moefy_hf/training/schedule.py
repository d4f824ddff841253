"""When a training run splits its FFNs and how many experts it computes: a list of phases, and nothing else.

All of it is a function of the step, so that a run can be resumed anywhere.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..errors import MoefyError

TARGET = "target"  # in place of a share: the budget of the config
STAGES = 16  # a moving budget takes so many values: each is a new graph for torch.compile


@dataclass(frozen=True)
class Phase:
    """Is a part of the training, which begins where the one before ends.

    Args:
        until: its end: a step (int), or a share of all steps (float in (0, 1]).
        k: average share of the experts that a token computes at the end of the phase, in (0, 1]; "target" is the
            budget of the `MoEficationConfig`.
        start: the same at its beginning, from where it moves to `k` in even stages; None stays at `k` throughout.
        split: group the neurons (anew), fit the routers and measure the budgets when the phase begins.
        name: for people.

    Raises:
        MoefyError: a step or a share out of range.

    Example:
        >>> phases = [Phase(0.1, k=1.0), Phase(0.5, start=1.0, split=True), Phase(1.0)]
        >>> callback = MoEficationCallback(MoEficationConfig(k=0.25), schedule=phases)
    """

    until: int | float
    k: float | str = TARGET
    start: float | str | None = None
    split: bool = False
    name: str = ""

    def __post_init__(self):
        whole = isinstance(self.until, int) and not isinstance(self.until, bool) and self.until >= 1
        if not whole and not (isinstance(self.until, float) and 0 < self.until <= 1):
            raise MoefyError(f"a phase ends at a step (int, at least 1) or a share in (0, 1], got {self.until!r}")
        for value in (self.k, self.start):
            share = isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= 1
            if not (value == TARGET or share or (value is None and self.k is not None)):
                raise MoefyError(f"experts of a phase must be a share in (0, 1] or {TARGET!r}, got {value!r}")


def one_step() -> list[Phase]:
    """Return the phases that convert before the first step, then fine-tune at the config's budget (MoEfication)."""
    return [Phase(1.0, split=True, name="fine-tune")]


def anneal(warmup: float = 0.1, over: float = 0.3) -> list[Phase]:
    """Return the phases that train dense, split, go down to the config's budget, and fine-tune there.

    Args:
        warmup: share of the training that is dense, in [0, 1).
        over: share of the training in which the budget goes down from all experts.
    """
    dense = [Phase(warmup, k=1.0, name="dense")] if warmup else []
    return [
        *dense,
        Phase(warmup + over, start=1.0, split=True, name="anneal"),
        Phase(1.0, name="fine-tune"),
    ]


def smoe_dropout() -> list[Phase]:
    """Return the phase that grows from the config's budget to all experts.

    With splitter and router "random" this is SMoE-Dropout (Chen et al., ICLR 2023).
    """
    return [Phase(1.0, k=1.0, start=TARGET, split=True, name="grow")]


def switchable(periods: int = 4, dense: float = 0.5) -> list[Phase]:
    """Return the phases that alternate between dense and sparse training, and end sparse (Zhang et al., ICML 2024).

    Each sparse phase has new experts.

    Args:
        periods: number of dense and sparse phases each.
        dense: share of a period that is dense, in (0, 1).
    """
    phases = []
    for period in range(periods):
        phases.append(Phase((period + dense) / periods, k=1.0, name=f"dense {period + 1}"))
        phases.append(Phase((period + 1) / periods, split=True, name=f"sparse {period + 1}"))
    return phases


SCHEDULES: dict[str, Callable[..., list[Phase]]] = {
    "one_step": one_step,
    "anneal": anneal,
    "smoe_dropout": smoe_dropout,
    "switchable": switchable,
}


def make_schedule(schedule: str | Sequence[Phase]) -> list[Phase]:
    """Return the phases of a schedule.

    Args:
        schedule: its name, or phases (`Phase` or its fields as a dict), which are returned.

    Raises:
        MoefyError: an unknown name (the valid ones are listed), no phases, or a phase that leaves experts out before
            any has split.
    """
    if isinstance(schedule, str):
        if schedule not in SCHEDULES:
            raise MoefyError(f"unknown schedule {schedule!r}; choose from {', '.join(SCHEDULES)}, or give phases")
        return SCHEDULES[schedule]()
    phases = [Phase(**phase) if isinstance(phase, dict) else phase for phase in schedule]
    if not phases:
        raise MoefyError("a schedule needs at least one phase")
    routed = next((i for i, phase in enumerate(phases) if phase.k != 1.0 or phase.start not in (None, 1.0)), None)
    if routed is not None and not any(phase.split for phase in phases[: routed + 1]):
        raise MoefyError(f"phase {routed} leaves experts out before any phase has split the neurons into experts")
    return phases


class Timetable:
    """Lays phases out over a number of steps.

    Args:
        phases: in order.
        total: number of steps of the training.

    Raises:
        MoefyError: a phase would end before, or with, the one before it, or begin after the training.
    """

    def __init__(self, phases: Sequence[Phase], total: int):
        self.phases = list(phases)
        self.ends = [p.until if isinstance(p.until, int) else max(1, round(p.until * total)) for p in phases]
        self.begins = [0, *self.ends[:-1]]
        for position, (begin, end) in enumerate(zip(self.begins, self.ends, strict=True)):
            if end <= begin or begin >= total:
                raise MoefyError(
                    f"phase {position} of the schedule would run from step {begin} to {end} of {total}: "
                    "train longer, or move it"
                )

    def at(self, step: int) -> int:
        """Return the index of the phase that a step is in; the last phase goes on for ever."""
        return next((i for i, end in enumerate(self.ends) if step < end), len(self.ends) - 1)

    def begins_at(self, step: int) -> Phase | None:
        """Return the phase that begins with this step, or None."""
        return self.phases[self.begins.index(step)] if step in self.begins else None

    def share(self, step: int, configured: float) -> float | str:
        """Return the average share of the experts computed at a step, or "target" where it is the config's budget.

        Args:
            step: steps that were taken before it.
            configured: the share of experts that the config's budget computes.
        """
        position = self.at(step)
        phase, begin, end = self.phases[position], self.begins[position], self.ends[position]
        done = min((step - begin) / (end - begin), 1.0)
        if phase.start is None or done == 1:
            return phase.k
        first, last = (configured if value == TARGET else float(value) for value in (phase.start, phase.k))
        share = first + (last - first) * int(done * STAGES) / STAGES
        return phase.start if share == first else share

    def splits_until(self, step: int) -> int:
        """Return how many phases that split have begun with this step or before it."""
        return sum(phase.split and begin <= step for phase, begin in zip(self.phases, self.begins, strict=True))


def as_dicts(phases: Sequence[Phase]) -> list[dict[str, Any]]:
    """Return phases as `make_schedule` takes them from JSON."""
    return [asdict(phase) for phase in phases]
