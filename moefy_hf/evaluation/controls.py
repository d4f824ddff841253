"""Stand-ins for a model's routers and selection while something is measured."""

import contextlib
from collections.abc import Collection, Iterator

import torch
from transformers import PreTrainedModel

from ..modeling.ffn_sites import FfnSite, FfnWeights
from ..modeling.router_base import Router, activation_mass, output_norm

CONTROLS = ("oracle", "oracle_mass", "random")  # in place of a router
BASELINES = ("cats", "teal", "wina")  # in place of experts, see neuron_baselines.py


class OracleRouter(Router):
    """Scores an expert by what it will do: needs the dense computation, so it bounds what a router can reach.

    Args:
        targets: `output_norm`, the norm of the expert's output, or `activation_mass`, the paper's ground truth.
        shared: experts that always run, and so have no score.
    """

    trainable = False

    def __init__(self, weights: FfnWeights, num_experts: int, targets=output_norm, shared: int = 0):
        super().__init__(weights.down.shape[0], num_experts - shared)
        self.shared = shared
        self.ffn, self.compute = [weights], targets  # in a list: nothing here is a parameter of this module

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        (ffn,), experts = self.ffn, (self.shared + self.num_experts, -1)
        neurons = ffn.neurons(x).flatten(0, -2).unflatten(-1, experts)  # (T, E, m)
        scores = self.compute(neurons[:, self.shared :], ffn.down.unflatten(-1, experts)[:, self.shared :])
        return scores.unflatten(0, x.shape[:-1])

    def strengths(self, scores: torch.Tensor) -> torch.Tensor:
        return scores

    def flops(self) -> int:
        return 0  # a bound, not a method: its cost is left out


class ChanceRouter(Router):
    """Draws experts anew for every token: the floor."""

    trainable = False

    def __init__(self, hidden_size: int, num_experts: int, seed: int = 0):
        super().__init__(hidden_size, num_experts)
        self.generator = torch.Generator().manual_seed(seed)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.rand(*x.shape[:-1], self.num_experts, generator=self.generator).to(x.device)

    def flops(self) -> int:
        return 0


def check_control(name: str, known: Collection[str] = (*CONTROLS, *BASELINES)) -> None:
    if name not in known:
        raise ValueError(f"unknown control {name!r}; choose from {', '.join(known)}")


def control_router(name: str, site: FfnSite, seed: int = 0) -> Router:
    """One of `CONTROLS` for a routed FFN; `seed` is of its random numbers."""
    routed = site.act
    if name == "random":
        return ChanceRouter(site.sizes[0], routed.router.num_experts, seed)
    targets = {"oracle": output_norm, "oracle_mass": activation_mass}[name]
    return OracleRouter(site.weights(), routed.num_experts, targets, routed.shared)


@contextlib.contextmanager
def routed_by(model: PreTrainedModel, control: str | None) -> Iterator[None]:
    """Use a control in place of every router; None keeps the model's own."""
    if control is not None:
        check_control(control, CONTROLS)
    own = [(site.act, site.act.router) for site in model.moe_sites()]
    if control is not None:
        for position, site in enumerate(model.moe_sites()):
            site.act.router = control_router(control, site, seed=position)
    try:
        yield
    finally:
        for routed, router in own:
            routed.router = router
