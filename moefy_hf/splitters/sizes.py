"""From labels to an order of neurons, expert by expert."""

import torch

from ..errors import MoefyError


def order_from_labels(labels: torch.Tensor, num_experts: int) -> torch.Tensor:
    """Return the neurons (f,) of part 0, then of part 1, ..., each in their old order.

    Args:
        labels: (f,) in [0, num_experts), the part of each neuron.

    Raises:
        MoefyError: the parts are not equally large.
    """
    counts = torch.bincount(labels, minlength=num_experts)
    if len(counts) != num_experts or (counts != len(labels) // num_experts).any() or len(labels) % num_experts:
        raise MoefyError(f"{num_experts} parts of equal size are needed, got sizes {counts.tolist()}")
    return torch.argsort(labels, stable=True)
