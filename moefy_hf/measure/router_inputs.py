"""What routers read, outside a forward pass of the model: the input of their own FFN, or of the first of a stack."""

from collections.abc import Sequence
from typing import Any

import torch

from ..modeling.ffn_sites import FfnSite
from ..modeling.routed_activation import is_routed
from ..modeling.router_base import Router
from .profile import ModelProfile


def scorer(router: Router) -> Any:
    """The router whose weights score for this one, most often itself; by name, for a checkpoint's own code makes
    classes of its own."""
    return router.leader if type(router).__name__ == "PreGatedRouter" else router


def read_at(sites: Sequence[FfnSite]) -> list[int]:
    """For each FFN the position of the one whose input its router reads."""
    own = {id(site.act.router): position for position, site in enumerate(sites) if is_routed(site.act)}
    return [
        own[id(scorer(site.act.router))] if is_routed(site.act) else position for position, site in enumerate(sites)
    ]


class ReadInputs:
    """What each router reads, while FFNs are shown one after another in forward order."""

    def __init__(self, sites: Sequence[FfnSite]):
        self.at = read_at(sites)
        self.held: dict[int, torch.Tensor] = {}

    def of(self, position: int, x: torch.Tensor) -> torch.Tensor:
        """x (T, d) of the FFN at `position` -> (T, d) what its router reads of the same tokens."""
        if self.at[position] == position:
            if position in self.at[position + 1 :]:
                self.held[position] = x
            return x
        return self.held[self.at[position]]


def check_same_tokens(sites: Sequence[FfnSite], found: ModelProfile, at: Sequence[int]) -> None:
    """
    Args:
        at: for each FFN the position of the one it is compared with, row by row of the sample.

    Raises:
        ValueError: a sample of other tokens.
    """
    for position, other in enumerate(at):
        own, read = found.sites[position].sampled, found.sites[other].sampled
        if own != read:
            raise ValueError(
                f"the profile holds {own} tokens of {sites[position].name} and {read} of {sites[other].name}: one "
                "router for both needs the same"
            )


def kept(act: Any, x: torch.Tensor) -> torch.Tensor | None:
    """What the router reads (T, d) -> (T, E) bool: which experts a routed activation runs; None for all of them."""
    return None if act.computes_all else act.chosen(scorer(act.router)(x))
