"""What routers read, outside a forward pass of the model: the input of their own FFN, or of the first of a stack."""

from collections.abc import Sequence
from typing import cast

import torch

from ..loading import routed
from ..modeling.ffn_sites import FfnSite
from ..modeling.routed_activation import RoutedActivation, is_routed
from ..modeling.router_base import Router
from ..modeling.router_pre_gated import PreGatedRouter
from .profile import ModelProfile


def scorer(router: Router) -> Router:
    """Return the router whose weights score for this one, most often itself.

    The check goes by name: a checkpoint's own code makes classes of its own.
    """
    return cast(PreGatedRouter, router).leader if type(router).__name__ == "PreGatedRouter" else router


def read_at(sites: Sequence[FfnSite]) -> list[int]:
    """Return for each FFN the position of the one whose input its router reads; for a dense FFN its own."""
    owner = {id(routed(site).router): position for position, site in enumerate(sites) if is_routed(site.act)}
    return [
        owner[id(scorer(routed(site).router))] if is_routed(site.act) else position
        for position, site in enumerate(sites)
    ]


class ReadInputs:
    """What each router reads, while FFNs are shown one after another in forward order."""

    def __init__(self, sites: Sequence[FfnSite]):
        self.at = read_at(sites)
        self.held: dict[int, torch.Tensor] = {}

    def of(self, position: int, x: torch.Tensor) -> torch.Tensor:
        """Return what the router of an FFN reads (T, d), from the FFN's own input x (T, d) of the same tokens."""
        if self.at[position] == position:
            if position in self.at[position + 1 :]:
                self.held[position] = x
            return x
        return self.held[self.at[position]]


def check_same_tokens(sites: Sequence[FfnSite], profile: ModelProfile, at: Sequence[int]) -> None:
    """Check that the sample of each FFN can be compared row by row with that of another.

    Args:
        at: for each FFN the position of the one it is compared with.

    Raises:
        ValueError: a sample of other tokens.
    """
    for position, other in enumerate(at):
        tokens, read = profile.sites[position].sampled, profile.sites[other].sampled
        if tokens != read:
            raise ValueError(
                f"the profile holds {tokens} tokens of {sites[position].name} and {read} of {sites[other].name}: one "
                "router for both needs the same"
            )


def select_experts(act: RoutedActivation, x: torch.Tensor) -> torch.Tensor | None:
    """Return which experts a routed activation runs, (T, E) bool, from what its router reads (T, d); None for all."""
    return None if act.computes_all else act.chosen(scorer(act.router)(x))
