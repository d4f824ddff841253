"""The conversions that a plan tries: what is known to work for an activation, and who says so."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import gcd
from typing import Any

import torch
from transformers import PreTrainedModel

from ..bench.engines.base import LANGUAGE_MODEL, kind_of
from ..config import MoEficationConfig
from ..errors import MoefyError
from ..modeling.ffn_sites import FfnSite, find_sites
from ..modeling.install import selected_sites

FEWEST = 4  # experts: of fewer hardly any can be left out
RELU, SMOOTH = "relu", "smooth"  # activations that are zero below zero, and others


@dataclass(frozen=True)
class Candidate:
    """A conversion that a plan tries.

    Attributes:
        name: of it.
        settings: of `MoEficationConfig`, without a budget. Of `CANDIDATES`, `expert_size` is the size that is wanted.
        activation: which it suits, `RELU` or `SMOOTH`.
        reason, source: why it is tried.
    """

    name: str
    settings: Mapping[str, Any]
    activation: str
    reason: str
    source: str


CANDIDATES = (
    Candidate(
        "moefication",
        {"splitter": "coactivation", "router": "linear", "expert_size": 32},
        RELU,
        "neurons that fire together need no others; 32 suits this package's kernel",
        "MoEfication, section 3; results/classifiers.md",
    ),
    Candidate(
        "moefication_large",
        {"splitter": "coactivation", "router": "linear", "expert_size": 128},
        RELU,
        "few large experts are fast in ONNX Runtime, and their router is small",
        "MoEfication, section 3; speed.md",
    ),
    Candidate(
        "output_aware",
        {"splitter": "output_aware", "router": "linear", "expert_size": 32, "compensation": True},
        SMOOTH,
        "groups what matters to the output; the average of experts that do not run is added",
        "G-MoEfication; results/splits_and_routers.md",
    ),
    Candidate(
        "single_neurons",
        {"splitter": "random", "router": "low_rank", "expert_size": 1},
        SMOOTH,
        "every neuron is chosen by itself; a low-rank router makes that cheap",
        "Deja Vu; results/language_models.md",
    ),
)
NAMES = tuple(each.name for each in CANDIDATES)


def candidates_for(model: PreTrainedModel, config: MoEficationConfig, names: tuple[str, ...] = ()) -> list[Candidate]:
    """Return the candidates that suit a model.

    Args:
        model: the dense one.
        config: its `towers` and `layers` say what is converted.
        names: these alone, whatever they suit.

    Raises:
        MoefyError: an unknown name.
    """
    if unknown := sorted({*names} - {*NAMES}):
        raise MoefyError(f"unknown method {', '.join(unknown)}; choose from {', '.join(NAMES)}")
    if names:
        return [each for each in CANDIDATES if each.name in names]
    activation = activation_of(converted_sites(model, config))
    return [each for each in CANDIDATES if each.activation == activation]


def converted_sites(model: PreTrainedModel, config: MoEficationConfig) -> list[FfnSite]:
    """Return the FFNs that are converted."""
    return selected_sites(find_sites(model, config.towers), config.layers)


def activation_of(sites: list[FfnSite]) -> str:
    """Return whether all FFNs leave exact zeros."""
    x = torch.linspace(-8, -0.5, 16)
    return RELU if all(not site.act(x).any() for site in sites) else SMOOTH


def config_of(
    candidate: Candidate, model: PreTrainedModel, config: MoEficationConfig, share: float
) -> MoEficationConfig:
    """Return the settings that a candidate is converted with.

    Args:
        candidate: it.
        model: the dense one, whose FFNs experts must divide.
        config: what is not the candidate's: towers, layers, seed, calibration tokens, and an allocation that is not
            "auto".
        share: of the experts.
    """
    kept = ("towers", "layers", "seed", "calibration_tokens")
    settings: dict[str, Any] = {name: getattr(config, name) for name in kept}
    settings |= {"allocation": allocation_of(model, config), "k": share, **candidate.settings}
    if candidate in CANDIDATES:
        widths = [site.sizes[1] for site in converted_sites(model, config)]
        settings["expert_size"] = nearest_divisor(gcd(*widths), settings["expert_size"])
    return MoEficationConfig(**settings)


def allocation_of(model: PreTrainedModel, config: MoEficationConfig) -> str:
    """Return how layers share a budget: by angles in language models, where comparing predictions takes long (CFSP,
    section 3); else as `MoEficationConfig` does."""
    if config.allocation == "auto" and kind_of(model) == LANGUAGE_MODEL:
        return "angular"
    return config.allocation


def nearest_divisor(number: int, wanted: int) -> int:
    """Return the divisor of a number that is nearest to a wanted one, as a ratio, of those that make some experts."""
    divisors = [each for each in range(1, number // FEWEST + 1) if number % each == 0] or [1]
    return min(divisors, key=lambda each: max(each, wanted) / min(each, wanted))
