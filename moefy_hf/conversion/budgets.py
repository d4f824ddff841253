"""Measure what allocations need of each layer: what restricting it alone does, and how far it turns hidden states."""

import itertools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from ..errors import MoefyError
from ..loading import check_moefied
from ..measure.contexts import all_experts, evaluating, hooked
from ..measure.hooks import run_with_hooks
from ..measure.metrics import Quality, predictions
from ..measure.padding import without_padding
from ..measure.processes import ALONE, Processes
from ..measure.progress import shared_batches
from ..measure.router_inputs import inputs_from
from ..modeling.ffn_sites import FfnSite
from ..modeling.section import Section
from ..modeling.selection_config import count_experts
from .replay import before, block_of, recorded, replayed

OTHERS = 'use allocation "uniform" or "sensitivity"'
GRID = (1 / 48, 1 / 16, 1 / 8, 1 / 4, 1 / 2)  # measured shares of a layer's experts


def measure_sensitivity(
    model: PreTrainedModel,
    batches: Iterable[Mapping[str, Any]],
    *,
    progress: bool = True,
    processes: Processes = ALONE,
) -> dict[str, list[list[float]]]:
    """Measure how far each layer, restricted alone to k experts, moves the model's predictions.

    Args:
        processes: that share the batches, of which all have all.

    Returns:
        `k`: for each routed layer the measured counts, the last of them E; `loss`: the mean divergence
        KL(dense || restricted), in nats, of the predicted distribution at each of them (0 at E).
    """
    model = check_moefied(model)
    sites = model.moe_sites()
    blocks = [block_of(model, site) for site in sites]
    grids: list[list[float]] = [_grid(site.act.num_experts, site.act.shared) for site in sites]

    def measured() -> list[Any]:
        positions, quality = 0, [[Quality() for _ in ks[:-1]] for ks in grids]
        for batch in shared_batches(batches, "sensitivity", processes, progress):
            with recorded([block for block in blocks if block is not None]) as outputs:
                dense, _ = predictions(model, batch)
            positions += len(dense)
            for site, block, read, ks, layer in zip(sites, blocks, inputs_from(sites), grids, quality, strict=True):
                everything = site.act.selection
                known = before(outputs, block)  # layers before this one do what they did
                known = {each: known[each] for each in known if each is not blocks[read]}  # its router's must run
                with replayed(known):
                    for k, restricted in zip(ks, layer, strict=False):
                        site.act.selection = replace(everything, k=k - site.act.shared)
                        restricted.update_(predictions(model, batch)[0], dense, None)
                site.act.selection = everything
        return [positions, *itertools.chain(*quality)]

    with evaluating(model), torch.no_grad(), all_experts(model):
        positions, *sums = processes.added(measured)
    if positions == 0:
        raise MoefyError("sensitivity cannot be measured: no batch, or none with a position that counts, was given")
    means = iter([each.divergence / each.count for each in sums])
    return {"k": grids, "loss": [[*itertools.islice(means, len(ks) - 1), 0.0] for ks in grids]}


def _grid(num_experts: int, shared: int) -> list[float]:
    least = max(1, shared)
    return sorted({max(least, round(share * num_experts)) for share in GRID} | {least, num_experts})


def measure_angles(
    model: PreTrainedModel,
    batches: Iterable[Mapping[str, Any]],
    *,
    progress: bool = True,
    processes: Processes = ALONE,
) -> dict[str, list[float]]:
    """Measure how far the layer around each routed FFN turns the hidden states, with all experts; needs no head.

    It is the coarse importance of CFSP (Wang et al., COLING 2025).

    Args:
        processes: that share the batches, of which all have all.

    Returns:
        `distance`: for each routed layer, arccos(cos(x, y)) / pi, from 0 to 1, of the hidden states x and y (d,) that
        it is given and returns; the mean over tokens that are no padding.

    Raises:
        MoefyError: no token is given, a routed FFN is in no layer, or a layer does not return what it is given,
            changed.
    """
    model = check_moefied(model)
    sites = model.moe_sites()
    if twice := [site.name for site, other in itertools.pairwise(sites) if site.name == other.name]:
        raise MoefyError(f"{twice[0]} changes hidden states of two kinds by an FFN each: {OTHERS}")
    layers = [layer_of(model, site) for site in sites]
    sums = torch.zeros(len(sites), 2, dtype=torch.float64)  # of angles, and how many
    batch: Mapping[str, Any] = {}

    def seen(position: int, args: tuple, kwargs: Mapping[str, Any], output: Any) -> None:
        x = next((each for each in (*args, *kwargs.values()) if torch.is_tensor(each)), None)
        y = output[0] if isinstance(output, tuple) else output
        if x is None or not torch.is_tensor(y) or x.shape != y.shape:
            raise MoefyError(f"the layer of {sites[position].name} returns other states than it is given: {OTHERS}")
        angles = without_padding(model, sites[position], batch, angular_distance(x, y).unsqueeze(-1))  # (T, 1)
        sums[position] += torch.tensor([float(angles.sum()), len(angles)])

    handles = [
        layer.register_forward_hook(
            lambda _, args, kwargs, output, i=position: seen(i, args, kwargs, output), with_kwargs=True
        )
        for position, layer in enumerate(layers)
    ]

    def measured() -> list[torch.Tensor]:
        nonlocal batch
        with hooked(handles), all_experts(model), run_with_hooks(model, [], lambda *_: None) as run:
            for batch in shared_batches(batches, "importance", processes, progress):
                run(batch)
        return [sums]

    (sums,) = processes.added(measured)
    if not sums[:, 1].all():
        raise MoefyError(
            "importance cannot be measured: no batch, or none with a token that is not padding, was given"
        )
    return {"distance": (sums[:, 0] / sums[:, 1]).tolist()}


def layer_of(model: PreTrainedModel, site: FfnSite) -> nn.Module:
    """Return the layer around an FFN.

    Raises:
        MoefyError: the FFN is in no list of layers.
    """
    block = block_of(model, site)
    if block is None:
        raise MoefyError(f"{site.name} is in no list of layers, whose hidden states could be compared: {OTHERS}")
    return block


def angular_distance(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Return the angle between x and y (..., d) over pi, (...).

    It is computed by the tangent of half of it, which is exact for small angles, too, unlike the arc cosine.
    """
    x, y = F.normalize(x.float(), dim=-1), F.normalize(y.float(), dim=-1)
    return 2 * torch.atan2((x - y).norm(dim=-1), (x + y).norm(dim=-1)) / torch.pi


# allocations of `budget_allocation.MEASURED` -> what measures the layers for them
MEASURES: dict[str, Callable[..., dict[str, Any]]] = {"sensitivity": measure_sensitivity, "angular": measure_angles}
COMPARING_PREDICTIONS = ("sensitivity",)  # those that need a head


def allocate_budgets_(
    model: PreTrainedModel,
    data: Iterable[Mapping[str, Any]],
    share: int | float = 0.2,
    allocation: str = "sensitivity",
    *,
    progress: bool = True,
) -> list[int]:
    """Measure every layer on `data` and select `share` of the experts on average accordingly, in place.

    The measurement is kept in the config, so that `model.set_selection(k=...)` later spreads any other budget, also
    after saving and loading.

    Args:
        data: model-ready batches, some thousand tokens; no labels needed.
        share: average k per layer, as in `set_selection`.
        allocation: what is measured: "sensitivity", what restricting a layer alone does to the model's predictions; or
            "angular", how far a layer turns the hidden states (CFSP), in one pass, which needs no head.

    Returns:
        k of each routed layer.

    Raises:
        MoefyError: the model is not MoEfied, `share` is out of range, `data` is empty, or `allocation` is none that is
            measured (the valid ones are listed).

    Example:
        >>> allocate_budgets_(model, batches, 0.3)  # k of each layer
        [9, 14, 6, 9]
    """
    model = check_moefied(model)
    if allocation not in MEASURES:
        raise MoefyError(f"allocation {allocation!r} measures nothing; choose from {', '.join(MEASURES)}")
    for site in model.moe_sites():  # finds a bad share before the work
        count_experts(share, site.act.num_experts, site.act.shared)
    Section(model.config).set_measured(allocation, MEASURES[allocation](model, data, progress=progress))
    model.set_selection(type="top_k", k=share, allocation=allocation)
    return [site.act.k for site in model.moe_sites()]
