"""What the routers of a model in training do: budgets, captured mass, how evenly experts are used."""

import math
from typing import Any

import torch
from transformers import PreTrainedModel

from ..loading import MoefiedModel, is_inline
from ..measure.padding import real_tokens
from ..modeling.ffn_sites import FfnSite


class RoutingMonitor:
    """Watches the forward passes of some steps through hooks, and sums up one FFN at a time.

    Only steps during which `watching` is True are counted. Padding does not count, and figures are those of this
    process.
    """

    def __init__(self):
        self.watching = False
        self.handles: list = []
        self.sites: list[FfnSite] = []
        self.batch: dict[str, Any] = {}
        self.forget()

    def forget(self) -> None:
        """Forget what was summed up."""
        self.load: dict[int, torch.Tensor] = {}  # position -> (E,) how often each expert was selected
        self.selected_mass: dict[int, torch.Tensor] = {}
        self.total_mass: dict[int, torch.Tensor] = {}
        self.hidden: dict[int, torch.Tensor] = {}

    def attach(self, model: MoefiedModel, active: bool = True) -> None:
        """Watch a model from here on, instead of the one before.

        Args:
            model: a MoEfied model.
            active: False reports budgets only; hooks would break the graphs of a compiled model.
        """
        self.detach()
        self.sites = model.moe_sites()
        if not active:
            return
        self.handles = [model.register_forward_pre_hook(self._start, with_kwargs=True)]
        for position, site in enumerate(self.sites):
            self.handles += [
                self._before(model, position),
                site.act.router.register_forward_hook(lambda _, args, y, i=position: self._route(model, i, y)),
            ]

    def detach(self) -> None:
        """Take the hooks off, and forget what was summed up."""
        for handle in self.handles:
            handle.remove()
        self.handles, self.batch = [], {}
        self.forget()

    def figures(self) -> dict[str, float]:
        """Return the figures since the last call, means over FFNs.

        `moe_experts` is the share of experts computed, `moe_experts_{i}` that of one FFN, where it is known. There is
        more where steps were watched. `moe_captured` is the share of the activation mass that selected experts hold
        (of the gate's mass in a gated FFN). `moe_load_entropy` is relative to an even load. `moe_dead_experts` is the
        number of experts that no token selected.
        """
        shares = [site.act.k / site.act.num_experts for site in self.sites if site.act.k is not None]
        figures = {f"moe_experts_{position}": share for position, share in enumerate(shares)}
        if shares:
            figures["moe_experts"] = sum(shares) / len(shares)
        if self.load:
            captured = [float(self.selected_mass[i] / self.total_mass[i].clamp_min(1e-12)) for i in self.load]
            loads = [load / load.sum().clamp_min(1) for load in self.load.values()]
            entropies = [float(torch.special.entr(load).sum()) / math.log(max(len(load), 2)) for load in loads]
            figures["moe_captured"] = sum(captured) / len(captured)
            figures["moe_load_entropy"] = sum(entropies) / len(entropies)
            figures["moe_dead_experts"] = sum(int((load == 0).sum()) for load in loads)
        self.forget()
        return figures

    def _before(self, model: PreTrainedModel, position: int) -> Any:
        """Register the hook that sees what the activation of an FFN is given; return its handle."""
        site = self.sites[position]
        if not is_inline(site):
            return site.act.register_forward_pre_hook(lambda _, args: self._hide(model, position, args[0]))

        def see(linear: torch.nn.Module, args: tuple, y: torch.Tensor) -> None:
            gate = y if site.spec.parts == 1 else y.chunk(2, -1)[int(site.spec.up_first)]
            self._hide(model, position, gate)

        return site.first.register_forward_hook(see)

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
        if hidden is None:  # this step is not watched
            return
        routed = self.sites[position].act
        mass = routed.inner(hidden).clamp_min(0).unflatten(-1, (routed.num_experts, -1)).sum(-1).flatten(0, -2).float()
        expert_mask = routed.chosen(scores.detach()).flatten(0, -2)  # (T, E)
        real = real_tokens(model, self.sites[position], self.batch, len(expert_mask))
        if real is not None:
            expert_mask, mass = expert_mask[real], mass[real]
        for sums, value in (
            (self.load, expert_mask.sum(0).float()),
            (self.selected_mass, (mass * expert_mask).sum()),
            (self.total_mass, mass.sum()),
        ):
            sums[position] = sums[position] + value if position in sums else value
