"""Activation markers: neurons that are among the strongest of the same tokens form an expert."""

import torch

from ..measure.profile import SiteProfile
from ..modeling.ffn_sites import FfnWeights
from .graph import coactivation_matrix, partition_graph
from .shared_experts import MARKED
from .sizes import order_from_labels


def activation_markers(
    weights: FfnWeights,
    profile: SiteProfile | None,
    num_experts: int,
    generator: torch.Generator,
    warm: bool = False,
) -> torch.Tensor:
    """(f,): balanced clusters of the neurons' binary columns that mark the tokens at which a neuron is among the ten
    largest by |activation| (CMoE, its construction of routed experts; shared experts are taken out before).

    The columns' Gram matrix counts the tokens that mark two neurons both, and k-means in equal parts keeps the most
    of it inside them (see `equal_parts`): no (f, T) matrix is needed.
    """
    if profile is None:
        raise ValueError('the splitter "activation_markers" needs calibration data')
    chunks = (marked(neurons) for _, neurons in profile.activations(weights))
    graph = coactivation_matrix(chunks, weights.down.shape[1])
    return order_from_labels(partition_graph(graph, num_experts, generator, warm=warm), num_experts)


def marked(neurons: torch.Tensor) -> torch.Tensor:
    """(T, f) -> (T, f): one where a neuron is among the token's `MARKED` largest by |activation|, else zero."""
    largest = neurons.abs().topk(min(MARKED, neurons.shape[-1]), dim=-1).indices
    return torch.zeros_like(neurons).scatter(-1, largest, 1)
