"""Parameter clustering: neurons whose input rows point the same way form an expert."""

import torch
import torch.nn.functional as F

from ..measure.profile import SiteProfile
from ..modeling.ffn_sites import FfnWeights
from .balanced_kmeans import balanced_kmeans
from .sizes import order_from_labels


def parameter_clustering(
    weights: FfnWeights,
    profile: SiteProfile | None,
    num_experts: int,
    generator: torch.Generator,
    warm: bool = False,
) -> torch.Tensor:
    """Return the neurons (f,), expert by expert: balanced k-means on the L2-normalised rows of `up`, of `gate` in a
    gated FFN (MoEfication, section 3.2)."""
    rows = F.normalize(weights.keys.detach().float().cpu(), dim=-1)  # (f, d)
    return order_from_labels(balanced_kmeans(rows, num_experts, generator, warm=warm), num_experts)
