"""Activation markers: neurons that are among the strongest of the same tokens form an expert."""

import torch

from ..measure.profile import SiteProfile
from ..modeling.ffn_sites import FfnWeights
from .graph import coactivation_matrix, partition_graph, sample_of
from .shared_experts import MARKED
from .sizes import order_from_labels


def activation_markers(
    weights: FfnWeights,
    profile: SiteProfile | None,
    num_experts: int,
    generator: torch.Generator,
    warm: bool = False,
) -> torch.Tensor:
    """Return the neurons (f,), expert by expert: balanced clusters of neurons that mark the same tokens (CMoE, its
    construction of routed experts).

    A neuron marks a token at which it is among the ten largest by |activation|. Shared experts are taken out before.
    The Gram matrix of the marks counts the tokens that mark two neurons both, and k-means in equal parts keeps the
    most of it inside them (see `equal_parts`): no (f, T) matrix is needed.

    Raises:
        MoefyError: there is no profile with a sample.
    """
    chunks = (marked(neurons) for _, neurons in sample_of(profile, "activation_markers").activations(weights))
    graph = coactivation_matrix(chunks, weights.down.shape[1])
    return order_from_labels(partition_graph(graph, num_experts, generator, warm=warm), num_experts)


def marked(neurons: torch.Tensor) -> torch.Tensor:
    """Return (T, f): one where a neuron of (T, f) is among the token's `MARKED` largest by |activation|, else zero."""
    largest = neurons.abs().topk(min(MARKED, neurons.shape[-1]), dim=-1).indices
    return torch.zeros_like(neurons).scatter(-1, largest, 1)
