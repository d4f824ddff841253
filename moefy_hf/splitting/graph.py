"""The co-activation graph of an FFN's neurons, and its partition into equal parts."""

from collections.abc import Iterable
from importlib.util import find_spec

import torch
from transformers.utils import logging

from .equal_parts import labels_of, multilevel_parts, swap_rows

logger = logging.get_logger("moefy_hf")

METHODS = ("metis", "swaps")
_LARGEST_WEIGHT = 2**20  # METIS adds integer weights up; their sums must stay far from overflow


def coactivation_matrix(neurons: Iterable[torch.Tensor], f: int) -> torch.Tensor:
    """Chunks (t, f) of activations -> (f, f): sum over tokens of h_n h_m where both are positive, zero diagonal
    (MoEfication, section 3.2)."""
    total = torch.zeros(f, f)
    for chunk in neurons:
        positive = chunk.detach().float().clamp_min(0).cpu()
        total.addmm_(positive.T, positive)
    return total.fill_diagonal_(0)


def partition_graph(
    weights: torch.Tensor, num_parts: int, generator: torch.Generator, method: str | None = None
) -> torch.Tensor:
    """Cut a graph into parts of exactly equal size, with little edge weight between them.

    Args:
        weights: (f, f) symmetric, not negative, zero diagonal.
        method: "metis", a METIS partition repaired to equal sizes (needs the `metis` extra), or "swaps", our multilevel
            local search. Default: METIS where it is installed. Either is finished by swapping neurons between parts.

    Returns:
        (f,) the part of each neuron.

    Raises:
        ValueError: f is not a multiple of `num_parts`, or the method is unknown.
        ImportError: "metis" was asked for and pymetis is not installed.
    """
    if num_parts < 1 or len(weights) % num_parts:
        raise ValueError(f"{len(weights)} neurons do not split into {num_parts} parts of equal size")
    if method is None:
        method = "metis" if find_spec("pymetis") else "swaps"
        if method == "swaps":
            logger.warning_once(
                "METIS is not installed (pip install 'moefy-hf[metis]'): using our own graph partition"
            )
    if method not in METHODS:
        raise ValueError(f"unknown partition method {method!r}; choose from {', '.join(METHODS)}")
    if method == "swaps" or num_parts == 1 or not weights.any():
        return labels_of(multilevel_parts(weights, num_parts, generator))
    labels = repair_sizes(weights, _metis(weights, num_parts, generator), num_parts)
    members = labels.argsort(stable=True).view(num_parts, -1)
    return labels_of(swap_rows(weights, members, generator))


def _metis(weights: torch.Tensor, num_parts: int, generator: torch.Generator) -> torch.Tensor:
    """(f,): parts of nearly equal size. Weights become integers in units of a low percentile of the non-zeros, as in
    the authors' code; edges below one unit are dropped."""
    try:
        import pymetis
    except ImportError as error:
        raise ImportError("the METIS partition needs pymetis: pip install 'moefy-hf[metis]'") from error
    sample = weights[weights > 0]
    unit = sample[:: max(1, len(sample) // 1_000_000)].quantile(0.01)
    neighbours, edges, starts = [], [], [0]
    for row in weights:
        whole = (row / unit).clamp_max(_LARGEST_WEIGHT).long()
        (index,) = whole.nonzero(as_tuple=True)
        neighbours.append(index)
        edges.append(whole[index])
        starts.append(starts[-1] + len(index))
    graph = pymetis.CSRAdjacency(starts, torch.cat(neighbours).numpy())
    seed = int(torch.randint(2**31 - 1, (), generator=generator))
    options = pymetis.Options(seed=seed)
    _, parts = pymetis.part_graph(num_parts, adjacency=graph, eweights=torch.cat(edges).numpy(), options=options)
    return torch.tensor(parts)


def repair_sizes(weights: torch.Tensor, labels: torch.Tensor, num_parts: int) -> torch.Tensor:
    """labels (f,) -> (f,) with equal sizes: out of the parts that are too large, the neuron goes whose move to a part with
    room loses the least edge weight, one after the other."""
    labels = labels.clone()
    f = len(labels)
    size = f // num_parts
    counts = torch.bincount(labels, minlength=num_parts)
    ties = weights.new_zeros(num_parts, f).index_add_(0, labels, weights)  # (parts, f): weight to each part
    while (counts > size).any():
        room = counts < size
        gain = ties.masked_fill(~room[:, None], -torch.inf) - ties.gather(0, labels[None])  # (parts, f)
        gain = gain.masked_fill((counts[labels] <= size)[None], -torch.inf)
        to, neuron = divmod(int(gain.argmax()), f)
        old = int(labels[neuron])
        labels[neuron] = to
        counts[old] -= 1
        counts[to] += 1
        ties[old] -= weights[neuron]
        ties[to] += weights[neuron]
    return labels
