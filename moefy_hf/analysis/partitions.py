"""How alike two partitions of the same neurons into experts are: two conversions, or two trainings of one model."""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from sklearn.metrics import adjusted_rand_score
from transformers import PreTrainedModel

from ..loading import check_moefied
from ..modeling.ffn_sites import FfnSite


def matched(left: torch.Tensor, right: torch.Tensor) -> tuple[np.ndarray, float]:
    """(f, n), (f, n) rows of neurons -> the row of `right` that each of `left` is, and the mean cosine of the pairs:
    1 where both hold the same neurons in another order."""
    cosines = (F.normalize(left.float(), dim=-1) @ F.normalize(right.float(), dim=-1).t()).numpy()
    rows, columns = linear_sum_assignment(-cosines)
    return columns, float(cosines[rows, columns].mean())


def rows_of(site: FfnSite) -> torch.Tensor:
    """(f, n): each neuron's weights, in and out."""
    weights = site.weights()
    return torch.cat([weights.keys, weights.down.t()], 1).detach().cpu()


def agreement(left: np.ndarray, right: np.ndarray) -> float:
    """(f,), (f,) expert of each neuron -> adjusted Rand index: 1 for the same partition, 0 on average by chance."""
    return float(adjusted_rand_score(left, right))


def compare_partitions(model: PreTrainedModel, other: PreTrainedModel, seed: int = 0) -> list[dict[str, Any]]:
    """A row per FFN: how alike the experts of two models are, and how alike a random partition is.

    Neurons are matched by their weights, so that it does not matter in which order a conversion has put them;
    `matched_cosine` says how well: near 1 for one model converted twice, lower for two trainings, and meaningless
    when near 0.

    Raises:
        ValueError: a model is not MoEfied, or their FFNs have different sizes.
    """
    for each in (model, other):
        check_moefied(each)
    pairs = list(zip(model.moe_sites(), other.moe_sites(), strict=False))
    if len(model.moe_sites()) != len(other.moe_sites()) or any(a.sizes != b.sizes for a, b in pairs):
        raise ValueError("the models have FFNs of different numbers or sizes: there is nothing to compare")
    generator, found = np.random.default_rng(seed), []
    for a, b in pairs:
        to, cosine = matched(rows_of(a), rows_of(b))
        left, right = (np.arange(site.sizes[1]) // site.act.expert_size for site in (a, b))
        found.append(
            {
                "name": a.name,
                "matched_cosine": cosine,
                "agreement": agreement(left, right[to]),
                "random": agreement(left, generator.permutation(right)),
            }
        )
    return found
