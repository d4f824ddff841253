"""Shared experts: the neurons that nearly every token needs, taken out before a splitter groups the others (CMoE)."""

import torch

from ..measure.profile import SiteProfile
from ..modeling.ffn_sites import FfnWeights

MARKED = 10  # neurons of the largest |activation| that a token marks (CMoE, section 3.2)


def activation_rates(weights: FfnWeights, profile: SiteProfile) -> torch.Tensor:
    """Return (f,): the share of sampled tokens for which a neuron is among the `MARKED` of the largest |activation|
    (CMoE, section 3.2).

    Raises:
        MoefyError: the profile kept no sample.
    """
    counts = torch.zeros(weights.down.shape[1], device=weights.down.device)
    for _, neurons in profile.sample.activations(weights):
        marked = neurons.abs().topk(min(MARKED, neurons.shape[1]), dim=-1).indices.flatten()
        counts += torch.bincount(marked, minlength=len(counts))
    return (counts / max(profile.sampled, 1)).cpu()


def apart(weights: FfnWeights, profile: SiteProfile, neurons: torch.Tensor) -> tuple[FfnWeights, SiteProfile]:
    """Return an FFN of some of the neurons (n,), and what the profile says of them."""
    stats = SiteProfile(len(neurons))
    stats.tokens, stats.inputs = profile.tokens, profile.inputs
    for name in ("active", "mass", "total", "square"):
        setattr(stats, name, getattr(profile, name)[neurons])
    return weights.of_neurons(neurons), stats
