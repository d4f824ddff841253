"""Give experts of all layers of a stack corresponding numbers, for one router that chooses for all of them."""

from collections.abc import Iterator, Sequence

import torch

from ..measure.profile import ModelProfile
from ..measure.router_inputs import check_same_tokens
from ..measure.sample import CHUNK, FfnSample
from ..modeling.ffn_sites import FfnSite, by_stack
from ..modeling.ffn_weights import FfnWeights
from ..modeling.router_base import output_norm


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


@torch.no_grad()
def aligned_orders(
    sites: Sequence[FfnSite],
    split: Sequence[torch.Tensor],
    num_experts: Sequence[int],
    found: ModelProfile,
    shared: int,
) -> list[torch.Tensor]:
    """Orders of neurons (f,), expert by expert -> the same experts, those of later layers in an order in which they
    are used at the same tokens as those of the layers before: in each stack, by maximum-weight assignment (Hungarian
    method) on the correlation, over the sample, of an expert's share of the token's output norms with the mean share
    of the experts that have a number so far. Shared experts stay first.

    Args:
        split: for each FFN its order, and `num_experts` its number of experts, the shared ones included.
        found: a profile of these FFNs, with a sample; neurons may have been permuted since.

    Raises:
        ValueError: the samples of a stack are of different tokens.
    """
    orders, place = list(split), {site.name: position for position, site in enumerate(sites)}

    def shares(position: int, name: str) -> torch.Tensor:
        file = found.file(name)
        weights = sites[position].weights().of_neurons(orders[position])
        for targets in expert_targets(weights, found.sites[position].sample, num_experts[position], shared):
            file.append(shares_of(targets))
        return file.mapped()

    for members in by_stack(sites).values():
        first, *later = (place[site.name] for site in members)
        check_same_tokens(sites, found, [first if position in later else position for position in range(len(sites))])

        reference = shares(first, "aligned.bin") if later else torch.zeros(0, 0)  # (T, E - S)
        for position in later:
            own = shares(position, "own.bin")
            from scipy.optimize import linear_sum_assignment  # takes a second to import

            _, best = linear_sum_assignment(correlation(reference, own), maximize=True)
            best = torch.from_numpy(best)
            for sums, each in zip(reference.split(CHUNK), own.split(CHUNK), strict=True):
                sums += each[:, best]
            experts = torch.cat([torch.arange(shared), shared + best])
            orders[position] = orders[position].view(num_experts[position], -1)[experts].flatten()
    return orders


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
