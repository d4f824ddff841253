"""What the routers of a model in training do: budgets, captured mass, how evenly experts are used."""

import math
from typing import Any

import torch
from transformers import PreTrainedModel

from ..measure.padding import real_tokens
from ..modeling.ffn_sites import FfnSite


class RoutingMonitor:
    """Watches the forward passes of some steps through hooks, and sums up one FFN at a time.

    Padding does not count; figures are those of this process.
    """

    def __init__(self):
        self.watching = False
        self.handles: list = []
        self.sites: list[FfnSite] = []
        self.batch: dict[str, Any] = {}
        self.forget()

    def forget(self) -> None:
        self.load: dict[int, torch.Tensor] = {}  # position -> (E,) how often each expert was chosen
        self.kept: dict[int, torch.Tensor] = {}
        self.mass: dict[int, torch.Tensor] = {}
        self.hidden: dict[int, torch.Tensor] = {}

    def attach(self, model: PreTrainedModel, active: bool = True) -> None:
        """active=False reports budgets only (hooks would break the graphs of a compiled model)."""
        self.detach()
        self.sites = model.moe_sites()
        if not active:
            return
        self.handles = [model.register_forward_pre_hook(self._start, with_kwargs=True)]
        for position, site in enumerate(self.sites):
            hidden = site.act.register_forward_pre_hook(lambda _, args, i=position: self._hide(model, i, args[0]))
            routed = site.act.router.register_forward_hook(lambda _, args, y, i=position: self._route(model, i, y))
            self.handles += [hidden, routed]

    def detach(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles, self.batch = [], {}
        self.forget()

    def figures(self) -> dict[str, float]:
        """Figures since the last call, means over FFNs: share of experts computed, where it is known; and where steps
        were watched, `moe_captured`, the share of the activation mass that chosen experts hold (of the gate's in a
        gated FFN), `moe_load_entropy` relative to an even load, and the number of `moe_dead_experts` that no token
        chose."""
        shares = [site.act.k / site.act.num_experts for site in self.sites if site.act.k is not None]
        found = {f"moe_experts_{position}": share for position, share in enumerate(shares)}
        if shares:
            found["moe_experts"] = sum(shares) / len(shares)
        if self.load:
            captured = [float(self.kept[i] / self.mass[i].clamp_min(1e-12)) for i in self.load]
            loads = [load / load.sum().clamp_min(1) for load in self.load.values()]
            entropies = [float(torch.special.entr(load).sum()) / math.log(max(len(load), 2)) for load in loads]
            found["moe_captured"] = sum(captured) / len(captured)
            found["moe_load_entropy"] = sum(entropies) / len(entropies)
            found["moe_dead_experts"] = sum(int((load == 0).sum()) for load in loads)
        self.forget()
        return found

    def _start(self, model: PreTrainedModel, args: tuple, kwargs: dict) -> None:
        self.batch = kwargs
        self.hidden.clear()

    def _hide(self, model: PreTrainedModel, position: int, hidden: torch.Tensor) -> None:
        routed = self.sites[position].act
        if self.watching and model.training and not routed.computes_all:
            self.hidden[position] = hidden.detach()

    @torch.no_grad()
    def _route(self, model: PreTrainedModel, position: int, scores: torch.Tensor) -> None:
        hidden = self.hidden.pop(position, None)
        if hidden is None:  # not asked for
            return
        routed = self.sites[position].act
        mass = routed.inner(hidden).clamp_min(0).unflatten(-1, (routed.num_experts, -1)).sum(-1).flatten(0, -2).float()
        keep = routed.chosen(scores.detach()).flatten(0, -2)  # (T, E)
        real = real_tokens(model, self.sites[position], self.batch, len(keep))
        if real is not None:
            keep, mass = keep[real], mass[real]
        for sums, value in (
            (self.load, keep.sum(0).float()),
            (self.kept, (mass * keep).sum()),
            (self.mass, mass.sum()),
        ):
            sums[position] = sums[position] + value if position in sums else value
