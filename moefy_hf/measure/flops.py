"""FLOPs per token, dense and routed. A multiply-add counts as two."""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from ..modeling.ffn_sites import FfnSite, find_sites
from ..modeling.moefied import is_moefied
from ..modeling.routed_activation import is_routed
from ..modeling.routers import router_facts
from .contexts import all_experts
from .router_inputs import inputs_from


def ffn_flops(site: FfnSite) -> int:
    """What one token costs in this FFN when all neurons are computed."""
    d, f = site.sizes
    return 2 * d * f * (2 if site.weights().gate is None else 3)


def routed_flops(site: FfnSite, experts: float) -> float:
    """What one token costs in this FFN with `experts` experts computed, the router included.

    All experts cost what the dense FFN does: nothing is routed then.
    """
    routed = site.act
    if not is_routed(routed) or experts >= routed.num_experts:
        return float(ffn_flops(site))
    router = routed.router.flops()
    if router_facts(routed.router).reuses_expert_compute:  # paid twice by none that runs
        router *= 1 - (experts - routed.shared) / routed.router.num_experts
    return ffn_flops(site) * experts / routed.num_experts + router


def routed_costs(sites: Sequence[FfnSite], computed: Mapping[str, float]) -> list[float]:
    """What one token costs in each FFN with so many experts computed, by the name of the FFN.

    A router that scores for several layers is paid where it reads, also if that FFN alone computes all its experts.
    """
    experts = [computed.get(site.name, 0) for site in sites]
    costs = [routed_flops(site, each) for site, each in zip(sites, experts, strict=True)]
    owed = set()
    for position, read in enumerate(inputs_from(sites)):
        if read != position and experts[position] < sites[position].act.num_experts:
            owed.add(read)
    for read in owed:
        if experts[read] >= sites[read].act.num_experts:
            costs[read] += sites[read].act.router.flops()
    return costs


@dataclass(frozen=True)
class ModelFlops:
    """FLOPs per token of a model: all of it, and its FFNs.

    Attributes:
        tokens: how many tokens each FFN sees, relative to the one that sees most: those of a decoder read other texts
            than those of its encoder.
    """

    total: float
    ffn: float
    tokens: tuple[float, ...]

    def routed(self, sites: Sequence[FfnSite], computed: Mapping[str, float]) -> float:
        """What all FFNs cost with so many experts computed, by the name of the routed FFN."""
        costs = routed_costs(sites, computed)
        return sum(seen * cost for seen, cost in zip(self.tokens, costs, strict=True))

    def ratio(self, routed_ffn: float) -> tuple[float, float]:
        """(FFN, whole model) FLOPs relative to dense when the FFNs cost `routed_ffn`."""
        return routed_ffn / self.ffn, (self.total - self.ffn + routed_ffn) / self.total


def _cpu_attention(query: torch.Size, key: torch.Size, value: torch.Size, *args, **kwargs) -> int:
    """Shapes (B, heads, T, ...) -> FLOPs of the fused attention on a CPU, which torch's counter does not know."""
    batch, heads, tokens, width = query
    return 2 * batch * heads * tokens * key[-2] * (width + value[-1])


_UNCOUNTED = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _cpu_attention}


def model_flops(model: PreTrainedModel, batch: Mapping[str, Any]) -> ModelFlops:
    """Count one forward pass over `batch`, per token of its FFNs (padding counts: it is computed too)."""
    sites = find_sites(model)
    tokens = [0] * len(sites)

    def count(position: int, args: tuple) -> None:
        tokens[position] += args[0].shape[:-1].numel()

    handles = [
        site.first.register_forward_pre_hook(lambda _, args, i=position: count(i, args))
        for position, site in enumerate(sites)
    ]
    device = next(model.parameters()).device
    batch = {key: value.to(device) if torch.is_tensor(value) else value for key, value in batch.items()}
    training = model.training
    model.eval()
    try:
        with contextlib.ExitStack() as stack:
            if is_moefied(model):  # what counts is the dense model, without routers
                stack.enter_context(all_experts(model))
            stack.enter_context(torch.no_grad())
            counter = stack.enter_context(FlopCounterMode(display=False, custom_mapping=_UNCOUNTED))
            model(**batch)
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    most = max(tokens)
    ffn = sum(seen * ffn_flops(site) for seen, site in zip(tokens, sites, strict=True)) / most
    return ModelFlops(counter.get_total_flops() / most, ffn, tuple(seen / most for seen in tokens))
