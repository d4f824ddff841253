"""Co-activation graph: neurons that fire together form an expert."""

import torch

from ..measure.profile import SiteProfile
from ..modeling.ffn_sites import FfnWeights
from .graph import coactivation_matrix, partition_graph
from .sizes import order_from_labels


def coactivation(
    weights: FfnWeights,
    profile: SiteProfile | None,
    num_experts: int,
    generator: torch.Generator,
    warm: bool = False,
) -> torch.Tensor:
    """(f,): balanced partition of the graph of neurons whose edges weigh how strongly two fire together on calibration
    tokens (MoEfication, section 3.2)."""
    if profile is None:
        raise ValueError('the splitter "coactivation" needs calibration data')
    chunks = (neurons for _, neurons in profile.activations(weights))
    graph = coactivation_matrix(chunks, weights.down.shape[1])
    return order_from_labels(partition_graph(graph, num_experts, generator, warm=warm), num_experts)
