"""Gate clustering: neurons whose gate rows lie close together form an expert."""

import torch

from ..measure.profile import SiteProfile
from ..modeling.ffn_sites import FfnWeights
from .balanced_kmeans import balanced_kmeans
from .sizes import order_from_labels


def gate_clustering(
    weights: FfnWeights,
    profile: SiteProfile | None,
    num_experts: int,
    generator: torch.Generator,
    warm: bool = False,
) -> torch.Tensor:
    """Return the neurons (f,), expert by expert: balanced k-means on the rows of `gate`, of `up` in an ungated FFN
    (EMoE, section 3, and D2DMoE's split of gated FFNs).

    All that differs from `parameter_clustering` is that rows keep their length, so that a cluster also shares how
    strongly its neurons answer.
    """
    rows = weights.keys.detach().float().cpu()  # (f, d)
    return order_from_labels(balanced_kmeans(rows, num_experts, generator, warm=warm), num_experts)
