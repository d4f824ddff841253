"""Controls: what stands in for a model's routers while something is measured."""

import contextlib
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

import torch

from ..errors import MoefyError
from ..loading import MoefiedModel, routed
from ..modeling.ffn_sites import FfnSite, FfnWeights
from ..modeling.router_base import Router, activation_mass, output_norm

Targets = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # neurons (T, E, m), down (d, E, m) -> (T, E)


class OracleRouter(Router):
    """Scores an expert by what it will do: needs the dense computation, so it bounds what a router can reach.

    Args:
        targets: `output_norm`, the norm of the expert's output, or `activation_mass`, the paper's ground truth.
        shared: experts that always run, and so have no score.
    """

    trainable = False

    def __init__(self, weights: FfnWeights, num_experts: int, targets: Targets = output_norm, shared: int = 0):
        super().__init__(weights.down.shape[0], num_experts - shared)
        self.shared = shared
        self.ffn, self.compute = [weights], targets  # in a list: nothing here is a parameter of this module

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return what each expert does, (..., E - S), from x (..., d)."""
        (ffn,), experts = self.ffn, (self.shared + self.num_experts, -1)
        neurons = ffn.neurons(x).flatten(0, -2).unflatten(-1, experts)  # (T, E, m)
        scores = self.compute(neurons[:, self.shared :], ffn.down.unflatten(-1, experts)[:, self.shared :])
        return scores.unflatten(0, x.shape[:-1])

    def strengths(self, scores: torch.Tensor) -> torch.Tensor:
        """Return the scores, which are what they stand for."""
        return scores

    def flops(self) -> int:
        """Return 0: this is a bound, not a method, and its cost is left out."""
        return 0


class ChanceRouter(Router):
    """Draws experts anew for every token: the floor."""

    trainable = False

    def __init__(self, hidden_size: int, num_experts: int, seed: int = 0):
        super().__init__(hidden_size, num_experts)
        self.generator = torch.Generator().manual_seed(seed)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return numbers between 0 and 1, (..., E), for x (..., d)."""
        return torch.rand(*x.shape[:-1], self.num_experts, generator=self.generator).to(x.device)

    def flops(self) -> int:
        """Return 0: nothing is multiplied."""
        return 0


def _oracle(targets: Targets) -> Callable[[FfnSite, int], Router]:
    def router(site: FfnSite, seed: int) -> Router:
        return OracleRouter(site.weights(), routed(site).num_experts, targets, routed(site).shared)

    return router


def _chance(site: FfnSite, seed: int) -> Router:
    return ChanceRouter(site.sizes[0], routed(site).router.num_experts, seed)


@dataclass(frozen=True)
class Control:
    """A way to choose experts that is no method.

    Attributes:
        router: (a routed FFN, seed of its random numbers) -> the router that stands in for its own.
        color: of its line in figures.
    """

    router: Callable[[FfnSite, int], Router]
    color: str


CONTROLS = {  # in place of a router
    "oracle": Control(_oracle(output_norm), "#2da44e"),
    "oracle_mass": Control(_oracle(activation_mass), "#8250df"),
    "random": Control(_chance, "#bf3989"),
}
BASELINES = {"cats": "#9a6700", "teal": "#1b7c83", "wina": "#bc4c00"}  # in place of experts, see baselines.py: colors


def check_control(name: str, known: Collection[str] = (*CONTROLS, *BASELINES)) -> None:
    """Check the name of a control.

    Raises:
        MoefyError: it is unknown; those that are known are listed.
    """
    if name not in known:
        raise MoefyError(f"unknown control {name!r}; choose from {', '.join(known)}")


def control_router(name: str, site: FfnSite, seed: int = 0) -> Router:
    """Return the router of one of `CONTROLS` for a routed FFN; `seed` is of its random numbers."""
    return CONTROLS[name].router(site, seed)


@contextlib.contextmanager
def routed_by(model: MoefiedModel, control: str | None) -> Iterator[None]:
    """Use a control in place of every router for a while; None keeps the model's own.

    Raises:
        MoefyError: the control is unknown.
    """
    if control is not None:
        check_control(control, CONTROLS)
    sites = model.moe_sites()
    routers = [(routed(site), routed(site).router) for site in sites]
    if control is not None:
        for position, site in enumerate(sites):
            routed(site).router = control_router(control, site, seed=position)
    try:
        yield
    finally:
        for act, router in routers:
            act.router = router
