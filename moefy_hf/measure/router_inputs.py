"""What routers read and choose outside a forward pass of the model, which most of them do for their own FFN alone."""

from collections.abc import Sequence
from typing import Any

import torch

from ..errors import MoefyError
from ..modeling.ffn_sites import FfnSite
from ..modeling.routed_activation import is_routed
from ..modeling.router_base import Router
from ..modeling.routers import router_facts
from .profile import ModelProfile


def scorer(router: Router) -> Any:
    """Return the router whose weights score for this one; older code that came with a checkpoint cannot say it."""
    return router_facts(router).scorer(router)


def scores_of(router: Router, x: torch.Tensor) -> torch.Tensor:
    """(..., d) -> (..., E): the scores of a router, for x that its FFN reads as `inputs_from` says."""
    return scorer(router)(x)


def select_experts(act: Any, x: torch.Tensor) -> torch.Tensor | None:
    """(T, d) -> (T, E) bool: which experts a routed activation runs, all of them where it is None.

    Args:
        x: what the router reads.
    """
    return None if act.computes_all else act.chosen(scores_of(act.router, x))


def inputs_from(sites: Sequence[FfnSite]) -> list[int]:
    """Return, for each FFN, the position of the one whose input its router reads: most often its own."""
    owner = {id(site.act.router): position for position, site in enumerate(sites) if is_routed(site.act)}
    return [
        owner[id(scorer(site.act.router))] if is_routed(site.act) else position for position, site in enumerate(sites)
    ]


def run_alone(sites: Sequence[FfnSite]) -> bool:
    """Whether each router reads the input of its own FFN, so that an FFN can run outside its model."""
    return inputs_from(sites) == [*range(len(sites))]


class RouterInputs:
    """What each router reads, while FFNs are shown one after another in forward order."""

    def __init__(self, sites: Sequence[FfnSite]):
        self.positions = inputs_from(sites)
        self.inputs: dict[int, torch.Tensor] = {}  # that later FFNs need, by position

    def of(self, position: int, x: torch.Tensor) -> torch.Tensor:
        """Return what the router of an FFN reads (T, d), given what the FFN reads of the same tokens."""
        if self.positions[position] == position:
            if position in self.positions[position + 1 :]:
                self.inputs[position] = x
            return x
        return self.inputs[self.positions[position]]


def check_same_sample(sites: Sequence[FfnSite], profile: ModelProfile, positions: Sequence[int]) -> None:
    """Check that a profile sampled the same tokens of FFNs that are compared token by token.

    Args:
        positions: for each FFN the position of the one it is compared with.

    Raises:
        MoefyError: a sample of other tokens.
    """
    for position, other in enumerate(positions):
        own, others = profile.sites[position].sampled, profile.sites[other].sampled
        if own != others:
            raise MoefyError(
                f"the profile holds {own} tokens of {sites[position].name} and {others} of {sites[other].name}: one "
                "router for both needs the same"
            )
