"""Spread one budget of experts over layers by what is measured of each: above all, what restricting it alone does to
the model's output."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..errors import MoefyError
from ..loading import check_moefied
from ..measure.contexts import all_experts, evaluating
from ..measure.metrics import Quality, predictions
from ..measure.router_inputs import inputs_from
from ..modeling.section import Section
from ..modeling.selection_config import count_experts
from .importance import measure_angles
from .replay import before, block_of, recorded, replayed

GRID = (1 / 48, 1 / 16, 1 / 8, 1 / 4, 1 / 2)  # measured shares of a layer's experts


def measure_sensitivity(
    model: PreTrainedModel, batches: Iterable[Mapping[str, Any]], *, progress: bool = True
) -> dict[str, list[list[float]]]:
    """How far each layer, restricted alone to k experts, moves the model's predictions.

    Returns:
        `k`: for each routed layer the measured counts, the last of them E; `loss`: the mean divergence
        KL(dense || restricted), in nats, of the predicted distribution at each of them (0 at E).
    """
    model = check_moefied(model)
    sites = model.moe_sites()
    blocks = [block_of(model, site) for site in sites]
    grids: list[list[float]] = [_grid(site.act.num_experts, site.act.shared) for site in sites]
    quality = [[Quality() for _ in ks] for ks in grids]
    bar = tqdm(desc="sensitivity", unit="batch", disable=not progress)
    positions = 0
    with evaluating(model), torch.no_grad(), all_experts(model), bar:
        for batch in batches:
            with recorded([block for block in blocks if block is not None]) as outputs:
                dense, _ = predictions(model, batch)
            positions += len(dense)
            for site, block, read, ks, layer in zip(sites, blocks, inputs_from(sites), grids, quality, strict=True):
                everything = site.act.selection
                known = before(outputs, block)  # layers before this one do what they did
                known = {each: known[each] for each in known if each is not blocks[read]}  # its router's must run
                with replayed(known):
                    for k, found in zip(ks[:-1], layer, strict=False):
                        site.act.selection = replace(everything, k=k - site.act.shared)
                        found.update_(predictions(model, batch)[0], dense, None)
                site.act.selection = everything
            bar.update()
    if positions == 0:
        raise MoefyError("sensitivity cannot be measured: no batch, or none with a position that counts, was given")
    losses = [[found.divergence / found.count for found in layer[:-1]] + [0.0] for layer in quality]
    return {"k": grids, "loss": losses}


def _grid(num_experts: int, shared: int) -> list[float]:
    least = max(1, shared)
    return sorted({max(least, round(share * num_experts)) for share in GRID} | {least, num_experts})


# allocations of `modeling.allocation.MEASURED` -> what measures the layers for them
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
    """
    model = check_moefied(model)
    if allocation not in MEASURES:
        raise MoefyError(f"allocation {allocation!r} measures nothing; choose from {', '.join(MEASURES)}")
    for site in model.moe_sites():  # finds a bad share before the work
        count_experts(share, site.act.num_experts, site.act.shared)
    Section(model.config).set_measured(allocation, MEASURES[allocation](model, data, progress=progress))
    model.set_selection(type="top_k", k=share, allocation=allocation)
    return [site.act.k for site in model.moe_sites()]
