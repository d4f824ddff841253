"""Random split: the control every other split must beat."""

import torch

from ..measure.profile import SiteProfile
from ..modeling.ffn_sites import FfnWeights


def random(
    weights: FfnWeights,
    profile: SiteProfile | None,
    num_experts: int,
    generator: torch.Generator,
    warm: bool = False,
) -> torch.Tensor:
    """Return a seeded random permutation (f,) of the neurons (MoEfication, section 3.2)."""
    return torch.randperm(weights.down.shape[1], generator=generator)
