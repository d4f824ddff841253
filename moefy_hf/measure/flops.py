"""FLOPs per token, dense and routed. A multiply-add counts as two."""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from ..loading import check_moefied, routed
from ..modeling.ffn_sites import FfnSite, find_sites
from ..modeling.moefied import is_moefied
from ..modeling.offload import device_of
from ..modeling.routed_activation import is_routed
from ..modeling.routers import router_facts
from .contexts import all_experts, evaluating, hooked
from .router_inputs import inputs_from


def ffn_flops(site: FfnSite) -> int:
    """Return the FLOPs of one token in an FFN whose neurons are all computed."""
    d, f = site.sizes
    return 2 * d * f * (2 if site.weights().gate is None else 3)


def routed_flops(site: FfnSite, experts: float) -> float:
    """Return the FLOPs of one token in an FFN that computes `experts` of its experts, the router included.

    All experts cost what the dense FFN does: nothing is routed then.

    Args:
        experts: a mean over tokens, so not always a whole number.
    """
    if not is_routed(site.act) or experts >= site.act.num_experts:
        return float(ffn_flops(site))
    act = routed(site)
    router = float(act.router.flops())
    if router_facts(act.router).reuses_expert_compute:  # experts that run do not pay it a second time
        router *= 1 - (experts - act.shared) / act.router.num_experts
    return ffn_flops(site) * experts / act.num_experts + router


def routed_costs(sites: Sequence[FfnSite], computed: Mapping[str, float]) -> list[float]:
    """Return the FLOPs of one token in each FFN.

    A router that scores for several layers is paid where it reads, also if that FFN alone computes all its experts.

    Args:
        computed: the key of an FFN -> how many experts it computes.
    """
    experts = [computed.get(site.key, 0) for site in sites]
    costs = [routed_flops(site, count) for site, count in zip(sites, experts, strict=True)]
    followed = set()  # FFNs whose router scores for a later one
    for position, read in enumerate(inputs_from(sites)):
        if read != position and experts[position] < routed(sites[position]).num_experts:
            followed.add(read)
    for read in followed:
        if experts[read] >= routed(sites[read]).num_experts:
            costs[read] += routed(sites[read]).router.flops()
    return costs


@dataclass(frozen=True)
class ModelFlops:
    """FLOPs per token of a dense model.

    Attributes:
        total, ffn: of the whole model, and of its FFNs.
        tokens: how many tokens each FFN computes, relative to the longest text: those of a decoder read other texts
            than those of its encoder, and an FFN that several layers use computes a token as often.
    """

    total: float
    ffn: float
    tokens: tuple[float, ...]

    def routed(self, sites: Sequence[FfnSite], computed: Mapping[str, float]) -> float:
        """Return the FLOPs per token of all FFNs; `computed` as `routed_costs` takes it."""
        costs = routed_costs(sites, computed)
        return sum(seen * cost for seen, cost in zip(self.tokens, costs, strict=True))

    def ratio(self, routed_ffn: float) -> tuple[float, float]:
        """Return FLOPs relative to dense, of the FFNs and of the whole model, when the FFNs cost `routed_ffn`."""
        return routed_ffn / self.ffn, (self.total - self.ffn + routed_ffn) / self.total


def _cpu_attention(query: torch.Size, key: torch.Size, value: torch.Size, *args, **kwargs) -> int:
    """Return the FLOPs of fused attention on a CPU, which torch's counter does not know; shapes (B, heads, T, ...)."""
    batch, heads, tokens, width = query
    return 2 * batch * heads * tokens * key[-2] * (width + value[-1])


_UNCOUNTED = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _cpu_attention}


def model_flops(model: PreTrainedModel, batch: Mapping[str, Any]) -> ModelFlops:
    """Count the FLOPs of one forward pass of the dense model, per token of its FFNs.

    Padding counts: it is computed, too. A MoEfied model is counted with all experts and no router.
    """
    sites = find_sites(model)
    tokens, most = [0] * len(sites), 0  # of all calls, of the longest

    def count(position: int, args: tuple) -> None:
        nonlocal most
        seen = args[0].shape[:-1].numel()
        tokens[position], most = tokens[position] + seen, max(most, seen)

    handles = (
        site.first.register_forward_pre_hook(lambda _, args, i=position: count(i, args))
        for position, site in enumerate(sites)
    )
    device = device_of(model)
    batch = {key: value.to(device) if torch.is_tensor(value) else value for key, value in batch.items()}
    counter = FlopCounterMode(display=False, custom_mapping=_UNCOUNTED)
    dense = all_experts(check_moefied(model)) if is_moefied(model) else contextlib.nullcontext()
    with hooked(handles), evaluating(model), dense, torch.no_grad(), counter:
        model(**batch)
    ffn = sum(seen * ffn_flops(site) for seen, site in zip(tokens, sites, strict=True)) / most
    return ModelFlops(counter.get_total_flops() / most, ffn, tuple(seen / most for seen in tokens))
