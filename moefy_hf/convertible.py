"""What is found wrong with a model, settings and calibration data before a conversion changes anything."""

from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from .architectures import moefied_class
from .budgets import COMPARING_PREDICTIONS, MEASURES
from .configuration import MoeficationConfig
from .modeling.allocation import count_experts, per_layer, resolve_selection, setting_name
from .modeling.ffn_sites import FfnSite, by_stack, find_sites
from .modeling.moefied import check_shared, is_moefied, selected_sites, split_sizes
from .modeling.routers import ROUTERS
from .profiling import ModelProfile
from .quality import predictions
from .router_fitting import tokens_needed
from .splitting import SPLITTERS

logger = logging.get_logger("moefy_hf")


def check_convertible(
    model: PreTrainedModel, config: MoeficationConfig, calibration: Any
) -> tuple[list[FfnSite], list[tuple[int, int]]]:
    """Find whatever can be found wrong before any work.

    Returns:
        the FFNs to convert, and (E, m) of each.

    Raises:
        ValueError: as `moefy_`, but for what only reading the calibration data shows.
    """
    if is_moefied(model):
        raise ValueError(
            f"{type(model).__name__} is MoEfied already; use set_selection, fit_routers or allocate_budgets on it"
        )
    sites = selected_sites(find_sites(model), config.layers)
    moefied_class(type(model))
    sizes = [split_sizes(site, config.num_experts, config.expert_size) for site in sites]
    check_shared(config.shared_experts, sites, sizes)
    check_counts(config.router, sites, [experts for experts, _ in sizes])
    if "k" in config.selection:
        for k, (experts, _) in zip(per_layer("k", config.selection["k"], len(sizes)), sizes, strict=True):
            count_experts(k, experts, config.shared_experts)
    else:
        resolve_selection(config.selection, [experts for experts, _ in sizes], shared=config.shared_experts)
    for site in sites:
        for name, param, _, _ in site.neuron_dims():
            if type(param) is not torch.nn.Parameter or param.is_meta:
                kind = "on the meta device" if param.is_meta else f"a {type(param).__name__}"
                raise ValueError(
                    f"{site.name}.{name} is {kind}: convert a model that is neither sharded, quantised nor offloaded"
                )
        if next(site.act.parameters(), None) is not None:
            raise ValueError(
                f"{site.name}: its activation {type(site.act).__name__} has parameters, which no split can follow"
            )
    allocation = config.selection.get("allocation")
    if allocation in COMPARING_PREDICTIONS and _headless(model):
        raise ValueError(
            f'allocation "{allocation}" compares predictions and {type(model).__name__} has no head: convert one '
            'that has, or use allocation "angular" or "uniform"'
        )
    if calibration is None:
        users = []
        if SPLITTERS[config.splitter].needs_profile:
            users.append(f"splitter {config.splitter!r}")
        if ROUTERS[config.router].trainable:
            users.append(f"router {config.router!r}")
        if allocation in MEASURES:
            users.append(f'allocation "{allocation}"')
        if setting_name(config.selection["type"]) and "k" in config.selection:
            users.append(f"selection {config.selection['type']!r} with a budget k")
        if config.shared_experts:
            users.append("shared_experts")
        if config.compensation:
            users.append("compensation")
        if users:
            raise ValueError(
                f"calibration data is missing: {' and '.join(users)} learns from it; give batches, or choose from "
                f"splitters {_names(SPLITTERS, 'needs_profile')} and routers {_names(ROUTERS, 'trainable')}"
            )
    return sites, sizes


def check_counts(router: str, sites: list[FfnSite], num_experts: list[int]) -> None:
    """
    Raises:
        ValueError: one router for all layers of a stack, which have different numbers of experts.
    """
    counts = {site.name: experts for site, experts in zip(sites, num_experts, strict=True)}
    for members in by_stack(sites).values():
        ROUTERS[router].check_counts([counts[site.name] for site in members], members[0].name)


def _names(registry: Mapping[str, Any], unwanted: str) -> str:
    return ", ".join(repr(name) for name, entry in registry.items() if not getattr(entry, unwanted))


def check_profile(
    config: MoeficationConfig, sites: list[FfnSite], sizes: list[tuple[int, int]], found: ModelProfile
) -> None:
    if len(found.sites) != len(sites):
        raise ValueError(f"the profile has {len(found.sites)} layers, {len(sites)} are to be converted")
    for site, (experts, _), stats in zip(sites, sizes, found.sites, strict=True):
        if len(stats.active) != site.sizes[1]:
            raise ValueError(
                f"the profile is of another model: {len(stats.active)} neurons, {site.name} has {site.sizes[1]}"
            )
        if stats.inputs is None:
            raise ValueError(
                f"the profile holds no sample of the inputs of {site.name}: none was kept, or it was closed"
            )
        needed = {"router " + repr(config.router): tokens_needed(site.sizes[0], experts - config.shared_experts)}
        if not ROUTERS[config.router].trainable:
            needed.clear()
        if SPLITTERS[config.splitter].needs_profile:
            needed["splitter " + repr(config.splitter)] = site.sizes[1]
        for what, tokens in needed.items():
            if stats.tokens < tokens:
                raise ValueError(
                    f"calibration is too small: {stats.tokens} tokens reached {site.name}, "
                    f"{what} needs at least {tokens}"
                )


@torch.no_grad()
def check_predictions(model: PreTrainedModel, batches: list[Mapping[str, Any]]) -> None:
    """Sensitivity compares predictions: find out that there are none before anything is changed."""
    remedy = 'select with "allocation": "angular" or "uniform" instead of "sensitivity"'
    try:
        found = any(len(predictions(model, batch)[0]) for batch in batches)
    except ValueError as error:
        raise ValueError(f"{error}; or {remedy}") from error
    if not found:
        raise ValueError(f"no position of the calibration data counts, all its labels are -100: {remedy}")


def _headless(model: PreTrainedModel) -> bool:
    cls = type(model) if is_moefied(model) else moefied_class(type(model))
    return cls._auto_class in ("AutoModel", "AutoModelForTextEncoding")


def default_allocation(model: PreTrainedModel, config: MoeficationConfig, calibration: Any) -> str:
    if calibration is None or isinstance(config.selection.get("k"), list | tuple):
        return "uniform"
    if _headless(model):
        logger.warning_once(f"{type(model).__name__} predicts nothing to measure sensitivity by: budgets are uniform")
        return "uniform"
    return "sensitivity"
