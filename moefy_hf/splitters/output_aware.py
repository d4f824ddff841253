"""Output-aware split: neurons that matter to the FFN's output at the same tokens form an expert."""

import torch

from ..measure.profile import SiteProfile
from ..modeling.ffn_sites import FfnWeights
from .graph import coactivation_matrix, partition_graph, sample_of
from .sizes import order_from_labels


def output_aware(
    weights: FfnWeights,
    profile: SiteProfile | None,
    num_experts: int,
    generator: torch.Generator,
    warm: bool = False,
) -> torch.Tensor:
    """Return the neurons (f,), expert by expert: a balanced partition of the graph of neurons that matter together.

    An edge weighs the sum over tokens of c_i * c_j, where c_i = |activation of i| * |column i of `down`| is what
    neuron i puts into the output. This one is ours. What a selection loses is the output of the experts left out,
    which signs of activations say nothing about outside ReLU, and lengths of `down` columns do.

    Raises:
        MoefyError: there is no profile with a sample.
    """
    lengths = weights.down.detach().float().norm(dim=0)  # (f,)
    chunks = (neurons.abs() * lengths for _, neurons in sample_of(profile, "output_aware").activations(weights))
    graph = coactivation_matrix(chunks, weights.down.shape[1])
    return order_from_labels(partition_graph(graph, num_experts, generator, warm=warm), num_experts)
