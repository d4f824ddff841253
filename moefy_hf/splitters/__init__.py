"""Splitters: which neurons form an expert. One file per method; `SPLITTERS` is their registry."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..measure.profile import SiteProfile
from ..modeling.ffn_sites import FfnWeights
from .activation_markers import activation_markers
from .coactivation import coactivation
from .gate_clustering import gate_clustering
from .output_aware import output_aware
from .parameter_clustering import parameter_clustering
from .random_split import random


@dataclass(frozen=True)
class Splitter:
    """A way to group neurons.

    Attributes:
        order: (weights, profile, num_experts, generator, warm) -> (f,) the neurons, expert by expert. With `warm`, the
            blocks in which the neurons lie now are one more start of the search, and kept where nothing is better.
        needs_profile: whether it looks at calibration data; `profile` may be None where it does not.
    """

    order: Callable[[FfnWeights, SiteProfile | None, int, torch.Generator, bool], torch.Tensor]
    needs_profile: bool


SPLITTERS: dict[str, Splitter] = {
    "random": Splitter(random, needs_profile=False),
    "parameter_clustering": Splitter(parameter_clustering, needs_profile=False),
    "gate_clustering": Splitter(gate_clustering, needs_profile=False),
    "coactivation": Splitter(coactivation, needs_profile=True),
    "activation_markers": Splitter(activation_markers, needs_profile=True),
    "output_aware": Splitter(output_aware, needs_profile=True),
}
