"""Routed activation: a dense FFN becomes a Mixture of Experts by replacing only its activation module.

Expert e owns the neurons [e*m, (e+1)*m) of the FFN's own Linear modules, whose names, shapes and types never change.
"""

import threading
from typing import Any

import torch
from torch import nn

from .router_base import Router
from .selection import Selection


class Observed(threading.local):
    """The FFN input on its way from the first Linear to the activation, and which experts run on theirs to `down`; one
    per thread, so that threads may share a model."""

    x: torch.Tensor | None = None
    kept: torch.Tensor | None = None

    def __deepcopy__(self, memo):
        return Observed()

    def __reduce__(self):
        return Observed, ()


class RoutedActivation(nn.Module):
    """Stands where the FFN's activation stood: act(h), with the neurons of unselected experts set to zero.

    A forward-pre-hook on the FFN's first Linear (`connect_`) hands over the FFN's input x, which the router scores.
    This is the masked form: dense compute, then mask; differentiable, and every Linear stays stock.
    """

    def __init__(self, act: nn.Module, router: Router, expert_size: int, selection: Selection, shared: int = 0):
        super().__init__()
        if next(act.parameters(), None) is not None:
            raise ValueError(f"{type(act).__name__} has parameters: its checkpoint names would change")
        self.inner, self.router = act, router
        self.num_experts, self.expert_size, self.shared = shared + router.num_experts, expert_size, shared
        self.selection = selection
        self.soft = False
        self.register_buffer("compensation", None)
        with torch.device("cpu"):  # the model may be under construction on the meta device
            self.zero_at_zero = bool(act(torch.zeros(1)) == 0)
        self.observed = Observed()
        self.tap: Any = None
        self.outlet: Any = None
        self.compensated: tuple[nn.Module, ...] = ()  # in a tuple: no child of this module

    @property
    def k(self) -> float | None:
        """Experts that a token computes, shared ones included; on average, where that depends on the token; None
        where nobody has measured it."""
        return None if self.selection.k is None else self.shared + self.selection.k

    @property
    def computes_all(self) -> bool:
        return self.selection.keeps_all(self.router.num_experts)

    @property
    def weighs(self) -> bool:
        """Whether all experts run, each times its router's strength: in training mode, while selection is learned
        (`soft`)."""
        return self.soft and self.training

    def connect_(self, linear: nn.Module) -> None:
        """(Re)attach to the Linear whose input the router reads; needed again after something replaced it."""
        if self.tap is not None:
            self.tap.remove()
        self.tap = linear.register_forward_pre_hook(self.observe)

    def compensate_(self, means: torch.Tensor) -> None:
        """Let neurons that do not run stand at their `means` (f,) instead of zero."""
        self.register_buffer("compensation", means)

    def observe(self, linear: nn.Module, args: tuple) -> None:
        self.observed.x = args[0]
        self.router.observe(args[0])

    def keep(self, x: torch.Tensor) -> torch.Tensor | None:
        """(..., d) -> (..., E) bool: which experts run; None for all of them. x is what the FFN runs on now."""
        if self.computes_all:
            return None
        scores = self.router(x.detach())
        self.router.hand_on(scores)
        return self.chosen(scores)

    def chosen(self, scores: torch.Tensor) -> torch.Tensor:
        """The router's scores (..., E - S) -> (..., E) bool: which experts run, the shared ones first."""
        return chosen(scores, self.router, self.selection, self.shared)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        x, self.observed.x = self.observed.x, None  # released here: nothing outlives the call
        if x is None or x.shape[:-1] != h.shape[:-1]:
            raise RuntimeError(
                "a routed activation did not see its FFN's input in this call; after replacing Linear modules "
                "call model.connect_(), and do not call the activation by itself"
            )
        if h.shape[-1] != self.num_experts * self.expert_size:
            raise RuntimeError(
                f"expected {self.num_experts * self.expert_size} neurons ({self.num_experts} experts of "
                f"{self.expert_size}), got {h.shape[-1]}: tensor-parallel shards of a MoEfied FFN cannot be routed"
            )
        if self.weighs:
            return self.weighted(self.inner(h), x)
        keep = self.keep(x)
        self.observed.kept = None if self.compensation is None else keep  # also over what an interrupted call left
        if keep is None:
            return self.inner(h)
        # masked_fill, not a product: 0 * inf would be nan. Before the activation, so that its gradient is finite, too;
        # that is enough where act(0) = 0
        neurons = self.inner(self.zero_dropped(h, keep))
        return neurons if self.zero_at_zero else self.zero_dropped(neurons, keep)

    def zero_dropped(self, neurons: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        """(..., f), (..., E) -> (..., f)"""
        experts = neurons.unflatten(-1, (self.num_experts, self.expert_size))
        return experts.masked_fill(~keep.unsqueeze(-1), 0).flatten(-2)

    def weighted(self, neurons: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """(..., f), (..., d) -> (..., f): shared experts as they are; gradients reach the router, and x through it."""
        weights = self.router.strengths(self.router(x)).to(neurons.dtype)  # (..., E - S)
        if self.shared:
            weights = torch.cat([weights.new_ones(*weights.shape[:-1], self.shared), weights], -1)
        experts = neurons.unflatten(-1, (self.num_experts, self.expert_size))
        return (experts * weights.unsqueeze(-1)).flatten(-2)

    def stand_in(self, down: nn.Module, args: tuple) -> tuple[torch.Tensor] | None:
        """Forward-pre-hook of `down`: its input (..., f), with the means of the neurons that did not run."""
        keep, self.observed.kept = self.observed.kept, None
        if keep is None:
            return None
        means = self.compensation.to(args[0].dtype).unflatten(0, (self.num_experts, self.expert_size))
        neurons = args[0].unflatten(-1, (self.num_experts, self.expert_size))
        return (torch.where(keep.unsqueeze(-1), neurons, means).flatten(-2),)


class outlet_to:
    """Forward-pre-hook of an FFN's owner: means go into whatever is its `down` now, an adapter around it included,
    which sees what `down` sees and so can be merged into it."""

    def __init__(self, routed: RoutedActivation, site: Any):
        self.routed, self.site = routed, site

    def __call__(self, owner: nn.Module, args: tuple) -> None:
        routed = self.routed
        if routed.compensation is not None and routed.compensated != (down := self.site.down,):
            if routed.outlet is not None:
                routed.outlet.remove()
            routed.outlet, routed.compensated = down.register_forward_pre_hook(routed.stand_in), (down,)


def chosen(scores: torch.Tensor, router: Router, selection: Selection, shared: int) -> torch.Tensor:
    """A router's scores (..., E - S) -> (..., E) bool: which experts run, the S shared ones first."""
    index, used = selection(router.strengths(scores) if selection.dynamic else scores)  # (..., K)
    keep = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, index, used)
    return torch.cat([keep.new_ones(*keep.shape[:-1], shared), keep], -1) if shared else keep


def is_routed(act: nn.Module) -> bool:
    """Whether an activation is routed; by name, for a copy of this file that came with a checkpoint makes its own
    class of it."""
    return type(act).__name__ == RoutedActivation.__name__
