"""Co-activation graph: neurons that fire together form an expert."""

import torch

from ..measure.profile import SiteProfile
from ..modeling.ffn_sites import FfnWeights
from .graph import coactivation_matrix, partition_graph, sample_of
from .sizes import order_from_labels


def coactivation(
    weights: FfnWeights,
    profile: SiteProfile | None,
    num_experts: int,
    generator: torch.Generator,
    warm: bool = False,
) -> torch.Tensor:
    """Return the neurons (f,), expert by expert: a balanced partition of the graph whose edges weigh how strongly two
    neurons fire together on calibration tokens (MoEfication, section 3.2).

    Raises:
        MoefyError: there is no profile with a sample.
    """
    chunks = (neurons for _, neurons in sample_of(profile, "coactivation").activations(weights))
    graph = coactivation_matrix(chunks, weights.down.shape[1])
    return order_from_labels(partition_graph(graph, num_experts, generator, warm=warm), num_experts)
