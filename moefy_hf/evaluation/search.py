"""The budget for a target: the most experts within some FLOPs, or the fewest that keep a quality."""

from collections.abc import Iterable, Mapping
from typing import Any

from transformers import PreTrainedModel

from ..loading import check_moefied
from ..measure.contexts import selecting
from ..measure.flops import ffn_flops, routed_costs
from ..measure.metrics import is_causal
from ..modeling.allocation import setting_name
from ..modeling.selection import threshold_of
from .sweep import Sweep, evaluate

STEPS = 64  # a quality is met to this part of the experts


def share_within(model: PreTrainedModel, flops: float) -> float:
    """The largest share of experts, as `set_selection(k=...)` takes it, whose FFNs cost at most `flops` of the dense
    ones, routers included; type and allocation are those that the model has.

    Raises:
        ValueError: the model is not MoEfied, `flops` is not in (0, 1], or the routers and one expert of every layer
            (the shared ones, where there are any) cost more; says how much.
    """
    check_moefied(model)
    if not 0 < flops <= 1:
        raise ValueError(f"flops={flops} is no share of the dense FFNs' FLOPs: it must lie in (0, 1]")
    experts = max(site.act.num_experts for site in model.moe_sites())
    low, high = 0, experts  # low is within the FLOPs
    if cost_of(model, 1.0) <= flops:
        return 1.0
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if cost_of(model, middle / experts) <= flops else (low, middle)
    if low == 0:
        least = cost_of(model, 1 / experts)
        raise ValueError(f"flops={flops:g} is less than the least that this model's FFNs cost: {least:.3g} of dense")
    return low / experts


def cost_of(model: PreTrainedModel, share: float) -> float:
    """FLOPs of the routed FFNs at a share of the experts, relative to dense."""
    with selecting(model, k=share):
        sites = model.moe_sites()
        return sum(routed_costs(sites, {site.name: site.act.k for site in sites})) / sum(map(ffn_flops, sites))


def search(
    model: PreTrainedModel,
    batches: Iterable[Mapping[str, Any]],
    quality: float,
    *,
    selection: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> tuple[dict[str, Any], Sweep]:
    """Find the fewest experts that keep a quality, by bisection; the model comes back as it was.

    Args:
        batches: as `evaluate` takes them.
        quality: relative to the dense model: accuracy (without labels: agreement) of at least this, in (0, 1];
            perplexity of at most this, 1 or more.
        selection: what is searched: a type and an allocation, those of the model by default. Types that depend on the
            token need `measure_reach` before.

    Returns:
        what `model.set_selection(**found)` takes: the setting itself where one serves all layers ("tau", ...), else k;
        and everything that was measured, in order of the budget.

    Raises:
        ValueError: as `evaluate`, or a quality out of range.
    """
    check_moefied(model)
    less = checked(model, batches, quality)
    asked = {name: value for name, value in (selection or {}).items() if name in ("type", "allocation")}
    with selecting(model, k=1.0, **asked):
        kind, allocation = (model.config.moefication["selection"].get(name) for name in ("type", "allocation"))
        experts = max(site.act.num_experts for site in model.moe_sites())
        settings: dict[str, Any] = {
            "selections": [kind],
            "allocations": [allocation or "uniform"],
            "controls": [],
            "local_tokens": 0,
        }
        found: dict[int, Sweep] = {}

        def enough(count: int) -> bool:
            found[count] = evaluate(model, batches, [count / experts], progress=progress, **settings)
            relative = found[count].rows[1]["relative_quality"]
            return relative <= quality if less else relative >= quality

        low, high = 0, experts  # high is enough
        step = max(1, experts // STEPS)
        while high - low > step:
            middle = (low + high) // 2
            low, high = (low, middle) if enough(middle) else (middle, high)
        found_selection = {"type": kind, "k": high / experts, "allocation": allocation or "uniform"}
        model.set_selection(**found_selection)
        name, chosen = setting_name(kind), [site.act.selection for site in model.moe_sites()]
        if name and high < experts and len({threshold_of(each) for each in chosen}) == 1:
            found_selection = {"type": kind, name: threshold_of(chosen[0])}
    sweep = Sweep([], {})
    for count in sorted(found):
        sweep.facts = found[count].facts
        sweep.rows += found[count].rows[bool(sweep.rows) :]
    sweep.facts = sweep.facts | {"target": {"quality": quality, "selection": found_selection}}
    return found_selection, sweep


def checked(model: PreTrainedModel, batches: Iterable[Mapping[str, Any]], quality: float) -> bool:
    """Whether less of what is going to be measured is better.

    Raises:
        ValueError: the target is out of range for that.
    """
    perplexity = is_causal(model) and next(iter(batches), {}).get("labels") is not None
    if perplexity and not quality >= 1:
        raise ValueError(f"a perplexity of {quality:g} of dense is no target: it must be 1 or more")
    if not perplexity and not 0 < quality <= 1:
        raise ValueError(f"{quality:g} of the dense model's quality is no target: it must lie in (0, 1]")
    return perplexity
