"""How much each layer does to the hidden states: what spreading a budget by angular distances needs."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..errors import MoefyError
from ..loading import check_moefied
from ..measure.contexts import all_experts, hooked
from ..measure.hooks import run_with_hooks
from ..measure.padding import without_padding
from ..modeling.ffn_sites import FfnSite
from .replay import block_of


def measure_angles(
    model: PreTrainedModel, batches: Iterable[Mapping[str, Any]], *, progress: bool = True
) -> dict[str, list[float]]:
    """How far the layer around each routed FFN turns the hidden states, with all experts (CFSP's coarse importance,
    Wang et al., COLING 2025). Needs no head.

    Returns:
        `distance`: for each routed layer, arccos(cos(x, y)) / pi, from 0 to 1, of the hidden states x and y (d,) that
        it is given and returns; the mean over tokens that are no padding.

    Raises:
        MoefyError: no token is given, or a routed FFN is in no layer.
    """
    model = check_moefied(model)
    sites = model.moe_sites()
    layers = [layer_of(model, site) for site in sites]
    sums = torch.zeros(len(sites), 2, dtype=torch.float64)  # of angles, and how many
    batch: Mapping[str, Any] = {}

    def seen(position: int, args: tuple, kwargs: Mapping[str, Any], output: Any) -> None:
        x, y = args[0] if args else kwargs["hidden_states"], output[0] if isinstance(output, tuple) else output
        angles = without_padding(model, sites[position], batch, angular_distance(x, y).unsqueeze(-1))  # (T, 1)
        sums[position] += torch.tensor([float(angles.sum()), len(angles)])

    handles = [
        layer.register_forward_hook(
            lambda _, args, kwargs, output, i=position: seen(i, args, kwargs, output), with_kwargs=True
        )
        for position, layer in enumerate(layers)
    ]
    with hooked(handles), all_experts(model), run_with_hooks(model, [], lambda *_: None) as run:
        for batch in tqdm(batches, desc="importance", unit="batch", disable=not progress):
            run(batch)
    if not sums[:, 1].all():
        raise MoefyError(
            "importance cannot be measured: no batch, or none with a token that is not padding, was given"
        )
    return {"distance": (sums[:, 0] / sums[:, 1]).tolist()}


def layer_of(model: PreTrainedModel, site: FfnSite) -> nn.Module:
    block = block_of(model, site)
    if block is None:
        raise MoefyError(f'{site.name} is in no list of layers, whose hidden states could be compared: use "uniform"')
    return block


def angular_distance(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """x, y (..., d) -> (...): the angle between them over pi. By the tangent of half of it: unlike the arc cosine,
    that is exact for small angles, too."""
    x, y = F.normalize(x.float(), dim=-1), F.normalize(y.float(), dim=-1)
    return 2 * torch.atan2((x - y).norm(dim=-1), (x + y).norm(dim=-1)) / torch.pi
