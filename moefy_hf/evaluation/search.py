"""The budget for a goal: the most experts within some FLOPs, or the fewest that keep a quality."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from transformers import PreTrainedModel

from ..errors import MoefyError
from ..loading import MoefiedModel, check_moefied, routed
from ..measure.contexts import selecting
from ..measure.flops import ffn_flops, routed_costs
from ..measure.metrics import is_causal
from ..measure.processes import ALONE, Processes
from ..modeling.section import Section
from ..modeling.selection import threshold_of
from ..modeling.selection_config import setting_name
from .sweep import Sweep, evaluate

STEPS = 64  # a quality is met to this part of the experts


def find_budget(
    model: PreTrainedModel,
    batches: Iterable[Mapping[str, Any]] | None = None,
    *,
    quality: float | None = None,
    flops: float | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Find the fewest experts that keep a quality, or the most that stay within some FLOPs.

    The model comes back as it was; the type of its selection and its allocation are those that are searched.

    Args:
        batches: for a quality, as `evaluate` takes them; FLOPs need none.
        quality: relative to the dense model: accuracy (without labels: agreement) of at least this, in (0, 1];
            perplexity of at most this, 1 or more.
        flops: of the routed FFNs relative to dense, in (0, 1], routers included.

    Returns:
        what `model.set_selection(**...)` takes.

    Raises:
        MoefyError: as `search` and `share_within`; or not exactly one goal, or a quality without batches.

    Example:
        model.set_selection(**find_budget(model, batches, quality=0.98))
        model.set_selection(**find_budget(model, flops=0.3))
    """
    if (quality is None) == (flops is None):
        raise MoefyError("find_budget takes one goal: a quality, or FLOPs")
    if flops is not None:
        return {"k": share_within(model, flops)}
    if batches is None or quality is None:
        raise MoefyError("a quality is measured on batches: give some, as evaluate takes them")
    selection, _ = search(model, batches, quality, progress=progress)
    return selection


def share_within(model: PreTrainedModel, flops: float) -> float:
    """Return the largest share of experts, as `set_selection(k=...)` takes it, whose FFNs cost at most `flops`.

    Args:
        flops: relative to the dense FFNs, routers included; type and allocation are those that the model has.

    Raises:
        MoefyError: the model is not MoEfied, `flops` is not in (0, 1], or the routers and one expert of every layer
            (the shared ones, where there are any) cost more; says how much.
    """
    model = check_moefied(model)
    if not 0 < flops <= 1:
        raise MoefyError(f"flops={flops} is no share of the dense FFNs' FLOPs: it must lie in (0, 1]")
    experts = max(routed(site).num_experts for site in model.moe_sites())
    low, high = 0, experts  # low is within the FLOPs
    if cost_of(model, 1.0) <= flops:
        return 1.0
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if cost_of(model, middle / experts) <= flops else (low, middle)
    if low == 0:
        least = cost_of(model, 1 / experts)
        raise MoefyError(f"flops={flops:g} is less than the least that this model's FFNs cost: {least:.3g} of dense")
    return low / experts


def cost_of(model: MoefiedModel, share: float) -> float:
    """Return the FLOPs of the routed FFNs at a share of the experts, relative to dense."""
    with selecting(model, k=share):
        sites = model.moe_sites()
        computed = {site.key: k for site in sites if (k := routed(site).k) is not None}
        return sum(routed_costs(sites, computed)) / sum(map(ffn_flops, sites))


def search(
    model: PreTrainedModel,
    batches: Iterable[Mapping[str, Any]],
    quality: float,
    *,
    selection: Mapping[str, Any] | None = None,
    progress: bool = True,
    processes: Processes = ALONE,
) -> tuple[dict[str, Any], Sweep]:
    """Find the fewest experts that keep a quality, by bisection; the model comes back as it was.

    Args:
        batches, quality: as in `find_budget`.
        selection: what is searched: a type and an allocation, those of the model by default. Types that depend on the
            token need `calibrate_thresholds_` before.
        processes: that share the batches, as in `evaluate`.

    Returns:
        what `model.set_selection(**...)` takes: the threshold itself where one serves all layers ("tau", ...), else k;
        and everything that was measured, in order of the budget.

    Raises:
        MoefyError: as `evaluate`, or a quality out of range.
    """
    model = check_moefied(model)
    less = less_is_better(model, batches, quality)
    given = {name: value for name, value in (selection or {}).items() if name in ("type", "allocation")}
    with selecting(model, k=1.0, **given):
        current = Section(model.config).selection
        kind, allocation = current["type"], current.get("allocation") or "uniform"
        experts = max(routed(site).num_experts for site in model.moe_sites())
        sweeps, options = dict[int, Sweep](), dict[str, Any](progress=progress, processes=processes)

        def enough(count: int) -> bool:
            sweeps[count] = evaluate(
                model,
                batches,
                [count / experts],
                selections=[kind],
                allocations=[allocation],
                controls=[],
                local_tokens=0,
                **options,
            )
            relative = sweeps[count].rows[1]["relative_quality"]
            return relative <= quality if less else relative >= quality

        count = fewest(enough, experts, max(1, experts // STEPS))
        best = {"type": kind, "k": count / experts, "allocation": allocation}
        model.set_selection(**best)
        if (name := setting_name(kind)) and count < experts:
            values = {threshold_of(routed(site).selection) for site in model.moe_sites()}
            if len(values) == 1:
                best = {"type": kind, name: values.pop()}
    sweep = Sweep([], {})
    for count in sorted(sweeps):
        sweep.facts = sweeps[count].facts
        sweep.rows += sweeps[count].rows[bool(sweep.rows) :]  # the dense row once
    sweep.facts = sweep.facts | {"target": {"quality": quality, "selection": best}}
    return best, sweep


def fewest(enough: Callable[[int], bool], experts: int, step: int) -> int:
    """Return by bisection how many of the experts are enough, up to `step` more than the fewest; all of them are."""
    low, high = 0, experts  # high is enough
    while high - low > step:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def less_is_better(model: PreTrainedModel, batches: Iterable[Mapping[str, Any]], quality: float) -> bool:
    """Return whether less of what is going to be measured is better: perplexity, and neither accuracy nor agreement.

    Raises:
        MoefyError: the quality is out of range for that.
    """
    perplexity = is_causal(model) and next(iter(batches), {}).get("labels") is not None
    check_target(quality, "perplexity" if perplexity else "quality")
    return perplexity


def check_target(quality: float, measure: str) -> None:
    """Check that a quality relative to dense is one that a model can have.

    Raises:
        MoefyError: it is out of range for this measure: of a perplexity less is better.
    """
    if measure == "perplexity" and not quality >= 1:
        raise MoefyError(f"a perplexity of {quality:g} of dense is no target: it must be 1 or more")
    if measure != "perplexity" and not 0 < quality <= 1:
        raise MoefyError(f"{quality:g} of the dense model's {measure} is no target: it must lie in (0, 1]")
