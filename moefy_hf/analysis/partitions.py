"""How alike two partitions of the same neurons into experts are: two conversions, or two trainings of one model."""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from sklearn.metrics import adjusted_rand_score
from transformers import PreTrainedModel

from ..errors import MoefyError
from ..loading import check_moefied, routed
from ..modeling.ffn_sites import FfnSite


def matched(left: torch.Tensor, right: torch.Tensor) -> tuple[np.ndarray, float]:
    """Pair the neurons of two FFNs so that the summed cosine of their rows is largest.

    Args:
        left, right: (f, n), a row for each neuron.

    Returns:
        the row of `right` that each of `left` is paired with, (f,), and the mean cosine of the pairs: 1 where both
        hold the same neurons in another order.
    """
    cosines = (F.normalize(left.float(), dim=-1) @ F.normalize(right.float(), dim=-1).t()).numpy()
    rows, columns = linear_sum_assignment(-cosines)
    return columns, float(cosines[rows, columns].mean())


def rows_of(site: FfnSite) -> torch.Tensor:
    """Return each neuron's weights, in and out: (f, n)."""
    weights = site.weights()
    return torch.cat([weights.keys, weights.down.t()], 1).detach().cpu()


def agreement(left: np.ndarray, right: np.ndarray) -> float:
    """Return the adjusted Rand index of two partitions: 1 for the same one, 0 on average by chance.

    Args:
        left, right: (f,), the expert of each neuron.
    """
    return float(adjusted_rand_score(left, right))


def compare_partitions(model: PreTrainedModel, other: PreTrainedModel, seed: int = 0) -> list[dict[str, Any]]:
    """Compare the experts of two models, and, as the control, with a random partition.

    Neurons are matched by their weights, so that it does not matter in which order a conversion has put them;
    `matched_cosine` says how well: near 1 for one model converted twice, lower for two trainings, and meaningless
    when near 0.

    Args:
        seed: of the random partition.

    Returns:
        a row per FFN: `name`, `matched_cosine`, and the adjusted Rand indices `agreement` and `random`.

    Raises:
        MoefyError: a model is not MoEfied, or their FFNs have different sizes.
    """
    left_sites, right_sites = (check_moefied(side).moe_sites() for side in (model, other))
    pairs = list(zip(left_sites, right_sites, strict=False))
    if len(left_sites) != len(right_sites) or any(a.sizes != b.sizes for a, b in pairs):
        raise MoefyError("the models have FFNs of different numbers or sizes: there is nothing to compare")
    generator, rows = np.random.default_rng(seed), []
    for a, b in pairs:
        to, cosine = matched(rows_of(a), rows_of(b))
        left, right = (np.arange(site.sizes[1]) // routed(site).expert_size for site in (a, b))
        rows.append(
            {
                "name": a.name,
                "matched_cosine": cosine,
                "agreement": agreement(left, right[to]),
                "random": agreement(left, generator.permutation(right)),
            }
        )
    return rows
