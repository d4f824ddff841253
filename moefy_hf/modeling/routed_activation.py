"""Routed activation: a dense FFN becomes a Mixture of Experts by replacing only its activation module.

Expert e owns the neurons [e*m, (e+1)*m) of the FFN's own Linear modules, whose names, shapes and types never change.
"""

import threading
from typing import Any

import torch
from torch import nn

from .routers import Router
from .selection import Selection


class Observed(threading.local):
    """The FFN input on its way from the first Linear to the activation; one per thread, so that threads may share a
    model."""

    x: torch.Tensor | None = None

    def __deepcopy__(self, memo):
        return Observed()

    def __reduce__(self):
        return Observed, ()


class RoutedActivation(nn.Module):
    """Stands where the FFN's activation stood: act(h), with the neurons of unselected experts set to zero.

    A forward-pre-hook on the FFN's first Linear (`connect_`) hands over the FFN's input x, which the router scores.
    This is the masked form: dense compute, then mask; differentiable, and every Linear stays stock.
    """

    def __init__(self, act: nn.Module, router: Router, expert_size: int, selection: Selection):
        super().__init__()
        if next(act.parameters(), None) is not None:
            raise ValueError(f"{type(act).__name__} has parameters: its checkpoint names would change")
        self.inner, self.router = act, router
        self.num_experts, self.expert_size = router.num_experts, expert_size
        self.selection = selection
        with torch.device("cpu"):  # the model may be under construction on the meta device
            self.zero_at_zero = bool(act(torch.zeros(1)) == 0)
        self.observed = Observed()
        self.tap: Any = None

    def connect_(self, linear: nn.Module) -> None:
        """(Re)attach to the Linear whose input the router reads; needed again after something replaced it."""
        if self.tap is not None:
            self.tap.remove()
        self.tap = linear.register_forward_pre_hook(self.observe)

    def observe(self, linear: nn.Module, args: tuple) -> None:
        self.observed.x = args[0]

    def keep(self, x: torch.Tensor) -> torch.Tensor | None:
        """(..., d) -> (..., E) bool: which experts run; None for all of them."""
        if self.selection.keeps_all(self.num_experts):
            return None
        scores = self.router(x.detach())  # (..., E)
        index, used = self.selection(scores)  # (..., K)
        return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, index, used)

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
        keep = self.keep(x)
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


def is_routed(act: nn.Module) -> bool:
    """Whether an activation is routed; by name, for a copy of this file that came with a checkpoint makes its own
    class of it."""
    return type(act).__name__ == RoutedActivation.__name__
