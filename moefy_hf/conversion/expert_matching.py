"""Give experts of all layers of a stack corresponding numbers, for one router that chooses for all of them."""

from collections.abc import Iterator, Sequence

import torch

from ..errors import MoefyError
from ..measure.profile import ModelProfile
from ..measure.router_inputs import check_same_sample
from ..measure.sample import CHUNK, FfnSample
from ..modeling.ffn_sites import FfnSite, stacks_of
from ..modeling.ffn_weights import FfnWeights
from ..modeling.routed_activation import RoutedActivation, is_routed
from ..modeling.router_base import output_norm
from ..modeling.routers import ROUTERS


def expert_targets(
    weights: FfnWeights, sample: FfnSample, experts: int, shared: int, targets=output_norm
) -> Iterator[torch.Tensor]:
    """Chunks (t, E - S) of the sample: what each routed expert does, in float32."""
    down = weights.down.detach().unflatten(-1, (experts, -1))[:, shared:]
    for _, neurons in sample.activations(weights):
        yield targets(neurons.unflatten(-1, (experts, -1))[:, shared:], down).float()


def shares_of(targets: torch.Tensor) -> torch.Tensor:
    """(T, E) -> (T, E): of the token's sum; zero where nothing fires."""
    return targets / targets.sum(-1, keepdim=True).clamp_min(1e-12)


def check_matchable(router: str, sites: Sequence[FfnSite], num_experts: Sequence[int]) -> None:
    """Check that a kind of router can choose among the experts of FFNs, where one of it serves a stack of layers.

    Args:
        router: a name of `ROUTERS`.
        num_experts: of each FFN, the shared experts included.

    Raises:
        MoefyError: one router for layers with different numbers of experts, or with code that came with a checkpoint.
    """
    if not ROUTERS[router].serves_stack:
        return
    if any(is_routed(site.act) and not isinstance(site.act, RoutedActivation) for site in sites):
        raise MoefyError(
            f"router {router!r} needs this package's own code, not that of a checkpoint: load the model with "
            "moefy_hf.load(name)"
        )
    counts = {site.key: experts for site, experts in zip(sites, num_experts, strict=True)}
    for members in stacks_of(sites).values():
        ROUTERS[router].check_counts([counts[site.key] for site in members], members[0].name)


@torch.no_grad()
def matched_orders(
    router: str,
    sites: Sequence[FfnSite],
    orders: Sequence[torch.Tensor],
    num_experts: Sequence[int],
    profile: ModelProfile | None,
    shared: int,
) -> list[torch.Tensor]:
    """Reorder the experts of later layers, so that those with the same number are used at the same tokens.

    Only routers that serve a stack of layers need that; for all others, and without a profile, the orders stay as they
    are. In each stack, experts get their numbers by maximum-weight assignment (Hungarian method). Its weights are the
    correlations, over the sample, of an expert's share of the token's output norms with the mean share of the experts
    that have a number so far. Shared experts stay first.

    Args:
        router: a name of `ROUTERS`.
        orders: of each FFN the order of its neurons (f,), expert by expert.
        num_experts: of each FFN, the shared experts included.
        profile: of these FFNs, with a sample; neurons may have been permuted since.

    Raises:
        MoefyError: the samples of a stack are of different tokens.
    """
    orders = list(orders)
    if profile is None or not ROUTERS[router].serves_stack:
        return orders
    positions = {site.key: position for position, site in enumerate(sites)}
    for members in stacks_of(sites).values():
        stack = [positions[site.key] for site in members]
        compared = [stack[0] if position in stack else position for position in range(len(sites))]
        check_same_sample(sites, profile, compared)
        with torch.autocast(sites[0].device.type, enabled=False):
            match_stack_(stack, sites, orders, num_experts, profile, shared)
    return orders


def match_stack_(
    stack: Sequence[int],
    sites: Sequence[FfnSite],
    orders: list[torch.Tensor],
    num_experts: Sequence[int],
    profile: ModelProfile,
    shared: int,
) -> None:
    """Replace the orders of all layers of a stack but the first; see `matched_orders`."""
    from scipy.optimize import linear_sum_assignment  # takes a second to import

    def shares(position: int, name: str) -> torch.Tensor:
        file = profile.file(name)
        weights = sites[position].weights().of_neurons(orders[position])
        for targets in expert_targets(weights, profile.sites[position].sample, num_experts[position], shared):
            file.append(shares_of(targets))
        return file.mapped()

    first, *later = stack
    reference = shares(first, "aligned.bin") if later else torch.zeros(0, 0)  # (T, E - S)
    for position in later:
        own = shares(position, "own.bin")
        _, best = linear_sum_assignment(correlation(reference, own), maximize=True)
        best = torch.from_numpy(best)
        for sums, added in zip(reference.split(CHUNK), own.split(CHUNK), strict=True):
            sums += added[:, best]
        experts = torch.cat([torch.arange(shared), shared + best])
        orders[position] = orders[position].view(num_experts[position], -1)[experts].flatten()


def correlation(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """(T, E), (T, E) -> (E, E): of each column of `a` with each of `b`; zero for one that never changes."""
    means = [each.mean(0, dtype=torch.float64) for each in (a, b)]
    product, squares = torch.zeros(a.shape[1], b.shape[1], dtype=torch.float64), [torch.zeros_like(m) for m in means]
    for chunks in zip(a.split(CHUNK), b.split(CHUNK), strict=True):
        x, y = (chunk.double() - mean for chunk, mean in zip(chunks, means, strict=True))
        product += x.t() @ y
        for sums, each in zip(squares, (x, y), strict=True):
            sums += each.square().sum(0)
    return product / torch.outer(*(sums.clamp_min(1e-30).sqrt() for sums in squares))
