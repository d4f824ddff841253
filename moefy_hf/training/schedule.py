"""When a training run splits its FFNs and how many experts it computes: a list of phases, and nothing else.

All of it is a function of the step, so that a run can be resumed anywhere.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

TARGET = "target"  # the budget that the conversion is configured with
STAGES = 16  # a moving budget takes so many values: each is a new graph for torch.compile


@dataclass(frozen=True)
class Phase:
    """A part of the training, from the end of the one before.

    Args:
        until: its end: a step (int), or a share of all steps (float in (0, 1]).
        k: average share of the experts that a token computes at the end of the phase; "target" is the budget of the
            `MoEficationConfig`.
        start: the same at its beginning, from where it moves to `k` in even stages; None keeps it at `k` throughout.
        split: group the neurons (anew), fit the routers and measure the budgets when the phase begins.
        name: for people.
    """

    until: int | float
    k: float | str = TARGET
    start: float | str | None = None
    split: bool = False
    name: str = ""

    def __post_init__(self):
        whole = isinstance(self.until, int) and not isinstance(self.until, bool) and self.until >= 1
        if not whole and not (isinstance(self.until, float) and 0 < self.until <= 1):
            raise ValueError(f"a phase ends at a step (int, at least 1) or a share in (0, 1], got {self.until!r}")
        for value in (self.k, self.start):
            share = isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= 1
            if not (value == TARGET or share or (value is None and self.k is not None)):
                raise ValueError(f"experts of a phase must be a share in (0, 1] or {TARGET!r}, got {value!r}")


def one_step() -> list[Phase]:
    """Convert before the first step, then fine-tune at the target budget (MoEfication)."""
    return [Phase(1.0, split=True, name="fine-tune")]


def anneal(warmup: float = 0.1, over: float = 0.3) -> list[Phase]:
    """Train dense, split, go down from all experts to the target budget, fine-tune there."""
    first = [Phase(warmup, k=1.0, name="dense")] if warmup else []
    return [
        *first,
        Phase(warmup + over, start=1.0, split=True, name="anneal"),
        Phase(1.0, name="fine-tune"),
    ]


def smoe_dropout() -> list[Phase]:
    """Grow from the target budget to all experts; with splitter and router "random" this is SMoE-Dropout."""
    return [Phase(1.0, k=1.0, start=TARGET, split=True, name="grow")]


def switchable(periods: int = 4, dense: float = 0.5) -> list[Phase]:
    """Alternate between dense and sparse training, with new experts each time; the last `1 / periods` of the training
    ends sparse (Zhang et al., ICML 2024)."""
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
    """A schedule by its name, or phases as they are.

    Raises:
        ValueError: an unknown name (the valid ones are listed), no phases, or a phase that leaves experts out before
            any has split.
    """
    if isinstance(schedule, str):
        if schedule not in SCHEDULES:
            raise ValueError(f"unknown schedule {schedule!r}; choose from {', '.join(SCHEDULES)}, or give phases")
        return SCHEDULES[schedule]()
    phases = [Phase(**phase) if isinstance(phase, dict) else phase for phase in schedule]
    if not phases:
        raise ValueError("a schedule needs at least one phase")
    routed = next((i for i, phase in enumerate(phases) if phase.k != 1.0 or phase.start not in (None, 1.0)), None)
    if routed is not None and not any(phase.split for phase in phases[: routed + 1]):
        raise ValueError(f"phase {routed} leaves experts out before any phase has split the neurons into experts")
    return phases


class Timetable:
    """Phases laid out over a number of steps.

    Raises:
        ValueError: a phase would end before, or with, the one before it, or begin after the training.
    """

    def __init__(self, phases: Sequence[Phase], total: int):
        self.phases = list(phases)
        self.ends = [p.until if isinstance(p.until, int) else max(1, round(p.until * total)) for p in phases]
        self.begins = [0, *self.ends[:-1]]
        for position, (begin, end) in enumerate(zip(self.begins, self.ends, strict=True)):
            if end <= begin or begin >= total:
                raise ValueError(
                    f"phase {position} of the schedule would run from step {begin} to {end} of {total}: "
                    "train longer, or move it"
                )

    def at(self, step: int) -> int:
        """The phase of a step; the last one goes on for ever."""
        return next((i for i, end in enumerate(self.ends) if step < end), len(self.ends) - 1)

    def begins_at(self, step: int) -> Phase | None:
        """The phase that begins with this step."""
        return self.phases[self.begins.index(step)] if step in self.begins else None

    def share(self, step: int, target: float) -> float | str:
        """Average share of the experts computed at a step; "target" where it is the target itself."""
        position = self.at(step)
        phase, begin, end = self.phases[position], self.begins[position], self.ends[position]
        done = min((step - begin) / (end - begin), 1.0)
        if phase.start is None or done == 1:
            return phase.k
        first, last = (target if value == TARGET else float(value) for value in (phase.start, phase.k))
        share = first + (last - first) * int(done * STAGES) / STAGES
        return phase.start if share == first else share

    def splits_until(self, step: int) -> int:
        """How many phases that split have begun with this step or before it."""
        return sum(phase.split and begin <= step for phase, begin in zip(self.phases, self.begins, strict=True))


def as_dicts(phases: Sequence[Phase]) -> list[dict[str, Any]]:
    return [asdict(phase) for phase in phases]
