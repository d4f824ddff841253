"""Routed activation: a dense FFN becomes a Mixture of Experts by replacing only its activation module.

Expert e owns the neurons [e*m, (e+1)*m) of the FFN's own Linear modules, whose names, shapes and types never change.
"""

import sys
import threading
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from .errors import MoefyError
from .router_base import Router
from .selection import Selection


class PerThread(threading.local):
    """What a call under way has to remember; one per thread, so that threads may share a model. Copies are new."""

    def __deepcopy__(self, memo):
        return type(self)()

    def __reduce__(self):
        return type(self), ()


class Observed(PerThread):
    """What an FFN's modules pass on beside the model's own code.

    Attributes:
        x: the FFN input (..., d), from the first Linear to the activation.
        kept: which experts run (..., E), and the means (f,) of all neurons, from the activation to `down`.
        computed: whether the FFN's output is known already, so that nothing is to be done to its neurons.
    """

    x: torch.Tensor | None = None
    kept: tuple[torch.Tensor, torch.Tensor] | None = None
    computed: bool = False


class RoutedActivation(nn.Module):
    """Stands where the FFN's activation stood: act(h), with the neurons of unselected experts set to zero.

    A forward-pre-hook on the FFN's first Linear (`connect_`) hands over the FFN's input x, which the router scores.
    This is the masked form: dense compute, then mask; differentiable, and every Linear stays stock.

    Attributes:
        inner: the dense FFN's activation.
        num_experts: E, the `shared` ones included, which come first; the router scores the others.
        selection: which of these run.
        soft: whether, in training mode, all experts run, each times its routing weight, while selection is learned.
        compensation: a buffer (f,) or None, see `compensate_`.
        neuron_order: a buffer (f,) or None: the position that each neuron had in the dense model, which is what
            adapters of the dense model go by; -1 where nobody knows.
        inline: whether the owner calls a function instead of this module, so that it acts on what goes into `down`.
        tap, outlet, handles: of the hooks on the first Linear, on `down` and on the FFN's owner.
    """

    compensation: torch.Tensor | None
    neuron_order: torch.Tensor | None

    def __init__(
        self,
        act: nn.Module,
        router: Router,
        expert_size: int,
        selection: Selection,
        shared: int = 0,
        inline: bool = False,
    ):
        super().__init__()
        if next(act.parameters(), None) is not None:
            raise MoefyError(f"{type(act).__name__} has parameters: its checkpoint names would change")
        self.inner, self.router = act, router
        self.num_experts, self.expert_size, self.shared = shared + router.num_experts, expert_size, shared
        self.selection = selection
        self.soft = False
        self.inline = inline
        self.register_buffer("compensation", None)
        self.register_buffer("neuron_order", None)
        with torch.device("cpu"):  # the model may be under construction on the meta device
            self.zero_at_zero = bool(act(torch.zeros(1)) == 0)
        self.observed = Observed()
        self.tap: Any = None
        self.handles: list[Any] = []
        self.outlet: Any = None
        self.reads: tuple[nn.Module, ...] = ()  # in tuples: no children of this module
        self.compensated: tuple[nn.Module, ...] = ()

    @property
    def k(self) -> float | None:
        """How many experts a token computes, shared ones included; an average where that depends on the token.

        It is None where nobody has measured that.
        """
        return None if self.selection.k is None else self.shared + self.selection.k

    @property
    def computes_all(self) -> bool:
        """Whether every token computes all experts, so that nothing is routed."""
        return self.selection.keeps_all(self.router.num_experts)

    @property
    def weighs(self) -> bool:
        """Whether all experts run, each times its routing weight; see `soft`."""
        return self.soft and self.training

    def connect_(self, linear: nn.Module) -> None:
        """Attach, again or for the first time, to the Linear whose input the router reads, or what wraps it."""
        if self.tap is not None:
            self.tap.remove()
        self.tap, self.reads = linear.register_forward_pre_hook(self.observe), (linear,)

    def compensate_(self, means: torch.Tensor) -> None:
        """Let neurons that do not run stand at their `means` (f,) instead of zero."""
        self.register_buffer("compensation", means)

    def _save_to_state_dict(self, *args) -> None:
        refuse_partial_save()
        super()._save_to_state_dict(*args)

    def observe(self, linear: nn.Module, args: tuple) -> None:
        """Forward-pre-hook of the first Linear: remember its input."""
        self.observed.x, self.observed.computed = args[0], False
        self.router.observe(args[0])

    def keep(self, x: torch.Tensor) -> torch.Tensor | None:
        """(..., d) -> (..., E) bool: which experts run for x, which the FFN runs on now; None for all of them."""
        if self.computes_all:
            return None
        scores = self.router(x.detach())
        self.router.hand_on(scores)
        return self.chosen(scores)

    def chosen(self, scores: torch.Tensor) -> torch.Tensor:
        """The router's scores (..., E - S) -> (..., E) bool: which experts run, the shared ones first."""
        return chosen(scores, self.router, self.selection, self.shared)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        """(..., f) -> (..., f): the activation of what the first Linear gave.

        Raises:
            RuntimeError: the FFN's input was not seen in this call, or the FFN is sharded.
        """
        x = self.take_input(h)
        if self.weighs:
            return self.weighted(self.inner(h), x)
        mask = self.keep(x)
        means = self.compensation  # handed on from here: an offloaded buffer is back on meta when `down` runs
        self.observed.kept = None if means is None or mask is None else (mask, means)  # over what an old call left
        if mask is None:
            return self.inner(h)
        # masked_fill, not a product: 0 * inf would be nan. Before the activation, so that its gradient is finite, too;
        # that is enough where act(0) = 0
        neurons = self.inner(self.zero_dropped(h, mask))
        return neurons if self.zero_at_zero else self.zero_dropped(neurons, mask)

    def take_input(self, h: torch.Tensor) -> torch.Tensor:
        """(..., f) -> (..., d): the input of the FFN that has these neurons; see `forward` for what is raised."""
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
        return x

    def zero_dropped(self, neurons: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """(..., f), (..., E) -> (..., f): zero where an expert does not run."""
        experts = neurons.unflatten(-1, (self.num_experts, self.expert_size))
        return experts.masked_fill(~mask.unsqueeze(-1), 0).flatten(-2)

    def weighted(self, neurons: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """(..., f), (..., d) -> (..., f): each expert times its routing weight, shared experts as they are.

        Gradients reach the router, and x through it.
        """
        weights = self.router.strengths(self.router(x)).to(neurons.dtype)  # (..., E - S)
        if self.shared:
            weights = torch.cat([weights.new_ones(*weights.shape[:-1], self.shared), weights], -1)
        experts = neurons.unflatten(-1, (self.num_experts, self.expert_size))
        return (experts * weights.unsqueeze(-1)).flatten(-2)

    def fill_means(self, down: nn.Module, args: tuple) -> tuple[torch.Tensor] | None:
        """Forward-pre-hook of `down`: its input (..., f), with the means of the neurons that did not run."""
        passed, self.observed.kept = self.observed.kept, None
        if self.inline:
            return None if self.observed.computed else (self.routed_neurons(args[0]),)
        return None if passed is None else (self.with_means(args[0], *passed),)

    def routed_neurons(self, neurons: torch.Tensor) -> torch.Tensor:
        """(..., f) -> (..., f): what `forward` does, after the activation."""
        x = self.take_input(neurons)
        if self.weighs:
            return self.weighted(neurons, x)
        if (mask := self.keep(x)) is None:
            return neurons
        if self.compensation is not None:
            return self.with_means(neurons, mask, self.compensation)
        return self.zero_dropped(neurons, mask)

    def with_means(self, neurons: torch.Tensor, mask: torch.Tensor, means: torch.Tensor) -> torch.Tensor:
        """(..., f), (..., E), (f,) -> (..., f): the means where an expert does not run."""
        means = means.to(neurons.dtype).unflatten(0, (self.num_experts, self.expert_size))
        experts = neurons.unflatten(-1, (self.num_experts, self.expert_size))
        return torch.where(mask.unsqueeze(-1), experts, means).flatten(-2)


class FollowReplacements:
    """A forward-pre-hook of an FFN's owner, which keeps the hooks on whatever its first Linear and its `down` are now.

    The router reads what goes into an adapter around the first Linear, which may change what the Linear inside sees
    (OFT, IA3), or never call it (HRA). Means go into an adapter around `down`, so that it can be merged.
    """

    def __init__(self, routed: RoutedActivation, site: Any):
        self.routed, self.site = routed, site

    def __call__(self, owner: nn.Module, args: tuple) -> None:
        routed = self.routed
        attached = torch.compiler.is_compiling() or routed.reads and routed.reads[0] is self.site.first
        if not attached:
            routed.connect_(self.site.first)
        if (routed.inline or routed.compensation is not None) and routed.compensated != (down := self.site.down,):
            if routed.outlet is not None:
                routed.outlet.remove()
            routed.outlet, routed.compensated = down.register_forward_pre_hook(routed.fill_means), (down,)


def chosen(scores: torch.Tensor, router: Router, selection: Selection, shared: int) -> torch.Tensor:
    """A router's scores (..., E - S) -> (..., E) bool: which experts run, the S shared ones first."""
    index, used = selection(router.strengths(scores) if selection.dynamic else scores)  # (..., K)
    mask = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, index, used)
    return torch.cat([mask.new_ones(*mask.shape[:-1], shared), mask], -1) if shared else mask


def refuse_partial_save() -> None:
    """Refuse to save routed FFNs as part of a model that is not MoEfied.

    Who saves is found by walking up the stack, for transformers does not tell modules.

    Raises:
        MoefyError: a model is being saved that holds routed FFNs, but is not MoEfied itself (one with a MoEfied tower,
            or a part of a MoEfied model): its checkpoint would load as a dense model.
    """
    frame = sys._getframe(1)
    while (frame := frame.f_back) is not None:
        if frame.f_code.co_name == "save_pretrained":
            model = frame.f_locals.get("self")
            if not isinstance(model, PreTrainedModel):
                continue
            if any(base.__name__ == "MoefiedMixin" for base in type(model).__mro__):
                return
            raise MoefyError(
                f"a {type(model).__name__} with MoEfied FFNs would load as a dense model, for its class knows no "
                "routers: save the MoEfied model itself, not a larger one around it, nor a part of it"
            )


def is_routed(act: nn.Module) -> bool:
    """Whether an activation is routed; by name, for a copy of this file that came with a checkpoint makes its own
    class of it."""
    return type(act).__name__ == RoutedActivation.__name__
