"""Interventions: what a model does without some of its experts, or with some of them made louder, for a while.

A forward-pre-hook on the FFN's `down` scales each expert's block of neurons. Routers choose as before: no other expert
takes the place of one that is switched off. Backends leave calls masked where `down` has a hook.
"""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from .errors import MoefyError
from .routed_activation import FollowReplacements


class ScaleExperts:
    """A forward-pre-hook of `down`: neurons (..., f) times a factor (E,) per expert.

    A factor of 0 also removes inf and nan.
    """

    def __init__(self, factors: torch.Tensor, expert_size: int):
        self.factors, self.expert_size = factors, expert_size

    def __call__(self, down: Any, args: tuple) -> tuple:
        neurons = args[0]
        factors = self.factors.to(neurons).unsqueeze(-1)  # (E, 1)
        experts = neurons.unflatten(-1, (len(factors), self.expert_size))
        return ((experts * factors).masked_fill(factors == 0, 0).flatten(-2), *args[1:])


@contextlib.contextmanager
def scaled(sites: list, factors: Mapping[int, Mapping[int, float]]) -> Iterator[None]:
    """Multiply what experts add to their FFN's output, `{layer: {expert: factor}}`, until the context ends.

    Raises:
        MoefyError: no such layer or expert, or a factor that is no number; nothing is changed then.
    """
    hooks = []
    for layer, experts in factors.items():
        if isinstance(layer, bool) or not isinstance(layer, int) or not 0 <= layer < len(sites):
            raise MoefyError(f"there is no routed layer {layer!r}: choose from 0 to {len(sites) - 1}")
        routed = sites[layer].act
        scale = torch.ones(routed.num_experts)
        for expert, factor in experts.items():
            if isinstance(expert, bool) or not isinstance(expert, int) or not 0 <= expert < routed.num_experts:
                raise MoefyError(f"layer {layer} has no expert {expert!r}: choose from 0 to {routed.num_experts - 1}")
            if isinstance(factor, bool) or not isinstance(factor, int | float) or not abs(factor) < float("inf"):
                raise MoefyError(f"layer {layer}, expert {expert}: the factor must be a number, got {factor!r}")
            scale[expert] = factor
        hooks.append((sites[layer].down, ScaleExperts(scale, routed.expert_size)))
    for layer in factors:  # means of neurons that do not run are filled in first, also in the very first call
        for hook in sites[layer].owner._forward_pre_hooks.values():
            if isinstance(hook, FollowReplacements):
                hook(sites[layer].owner, ())
    handles = [down.register_forward_pre_hook(hook) for down, hook in hooks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
