"""What is found wrong with a model, settings and calibration data before a conversion changes anything."""

import gc
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from ..config import AUTO, MoEficationConfig
from ..conversion.permute import check_plain
from ..errors import CalibrationError, MoefyError, UnsupportedModel
from ..loading import moefied_class
from ..measure.metrics import OVERFLOW, is_adapted, predictions, usable
from ..measure.profile import ModelProfile
from ..modeling.ffn_sites import FfnSite, find_sites
from ..modeling.install import check_shared, selected_sites, split_sizes
from ..modeling.moefied import is_moefied
from ..modeling.offload import is_offloaded, offload_hook
from ..modeling.routers import ROUTERS
from ..modeling.selection_config import count_experts, per_layer, resolve_selection
from ..splitters import SPLITTERS
from .budgets import COMPARING_PREDICTIONS
from .expert_matching import check_matchable
from .fit_routers import tokens_needed

logger = logging.get_logger("moefy_hf")


def check_convertible(
    model: PreTrainedModel, config: MoEficationConfig, calibration: Any
) -> tuple[list[FfnSite], list[tuple[int, int]]]:
    """Find whatever can be found wrong before any work.

    Returns:
        the FFNs to convert, and (E, m) of each.

    Raises:
        MoefyError: as `moefy_`, but for what only reading the calibration data shows.
    """
    check_unwrapped(model)
    if is_moefied(model):
        raise MoefyError(
            f"{type(model).__name__} is MoEfied already; use set_selection, fit_routers_ or allocate_budgets_ on it"
        )
    sites = selected_sites(find_sites(model, config.towers), config.layers)
    moefied_class(type(model), model.config)
    sizes = [split_sizes(site, config.num_experts, config.expert_size) for site in sites]
    check_shared(config.shared_experts, sites, sizes)
    check_matchable(config.router, sites, [experts for experts, _ in sizes])
    if config.threshold is None:
        for k, (experts, _) in zip(per_layer("k", config.k, len(sizes)), sizes, strict=True):
            count_experts(k, experts, config.shared_experts)
    else:
        chosen = config.selection_section()
        resolve_selection(chosen, [experts for experts, _ in sizes], shared=config.shared_experts)
    owners: dict[int, str] = {}
    tied = {**(getattr(model, "all_tied_weights_keys", None) or {})}
    tied_names = {*tied, *tied.values()}
    for site in sites:
        check_plain(site)
        for name, param, _, _ in site.neuron_dims():
            offloaded = offload_hook(site.owner.get_submodule(name.rpartition(".")[0])) is not None
            if type(param) is not torch.nn.Parameter or (param.is_meta and not offloaded):
                kind = "on the meta device" if param.is_meta else f"a {type(param).__name__}"
                wanted = "convert a model that is neither sharded, quantised nor without weights"
                raise MoefyError(f"{site.name}.{name} is {kind}: {wanted}")
            if offloaded and f"{site.name}.{name}" in tied_names:  # each would have an order of its own
                raise MoefyError(f"{site.name} shares {name} with another module: load it into memory to convert it")
            if (other := owners.setdefault(id(param), site.key)) != site.key:
                raise MoefyError(f"{site.key} and {other} share {name}: one order of neurons cannot suit both")
            if not offloaded and not param.isfinite().all():  # reading all of them takes long; a profile finds out
                raise MoefyError(f"{site.name}.{name} holds weights that are not finite in {param.dtype}: {OVERFLOW}")
        if next(site.act.parameters(), None) is not None:
            raise MoefyError(
                f"{site.name}: its activation {type(site.act).__name__} has parameters, which no split can follow"
            )
    if config.allocation in COMPARING_PREDICTIONS and _headless(model):
        raise MoefyError(
            f'allocation "{config.allocation}" compares predictions and {type(model).__name__} has no head: convert '
            'one that has, or use allocation "angular" or "uniform"'
        )
    if calibration is None and (users := config.needs()):
        raise CalibrationError(
            f"calibration data is missing: {' and '.join(users)} learns from it; give batches, or choose from "
            f"splitters {_names(SPLITTERS, 'needs_profile')} and routers {_names(ROUTERS, 'trainable')}"
        )
    return sites, sizes


def check_unwrapped(model: Any) -> None:
    """Check that neurons of a model can be permuted where they are.

    Raises:
        UnsupportedModel: no transformers model, or one that is wrapped, sharded, or part of a larger one.
    """
    names = {base.__name__ for base in type(model).__mro__}
    if is_adapted(model):
        raise UnsupportedModel(
            "an adapter cannot follow neurons that are permuted: merge it first, model = model.merge_and_unload(), or "
            "add it after conversion"
        )
    if "OptimizedModule" in names:
        raise UnsupportedModel("this model is compiled: convert the one inside, model._orig_mod, and compile that")
    if names & {"FSDPModule", "FullyShardedDataParallel"}:
        raise UnsupportedModel(
            "FSDP has sharded this model, and shards cannot be permuted: convert it before it is sharded"
        )
    if names & {"DataParallel", "DistributedDataParallel"}:
        raise UnsupportedModel(
            f"this is a {type(model).__name__}: convert the model inside, model.module, and wrap that"
        )
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedModel(f"what is converted is a transformers model, got a {type(model).__name__}")
    if whole_around(model) is None:
        return
    gc.collect()  # a whole that was deleted may linger
    if (whole := whole_around(model)) is not None:
        raise UnsupportedModel(
            f"this {type(model).__name__} is part of a {type(whole).__name__}, which would be saved with routers and "
            "load as a dense model: convert the whole; or take the part out first (part = whole.part; del whole)"
        )


def whole_around(model: torch.nn.Module) -> PreTrainedModel | None:
    """Return a transformers model that holds this one, at any depth; None where none does."""
    for holder in gc.get_referrers(model):
        if type(holder) is dict and all(isinstance(each, torch.nn.Module | None) for each in holder.values()):
            for owner in owners_of(holder):
                if isinstance(owner, PreTrainedModel):
                    return whole_around(owner) or owner
                if (whole := whole_around(owner)) is not None:
                    return whole
    return None


def owners_of(children: dict[str, Any]) -> list[torch.nn.Module]:
    """Return the modules whose children these are: Python keeps attributes in a dictionary or in the object itself."""
    owners = []
    for each in gc.get_referrers(children):
        holders = gc.get_referrers(each) if type(each) is dict and each.get("_modules") is children else [each]
        owners += [held for held in holders if isinstance(held, torch.nn.Module) and held._modules is children]
    return owners


def _names(registry: Mapping[str, Any], unwanted: str) -> str:
    return ", ".join(repr(name) for name, entry in registry.items() if not getattr(entry, unwanted))


def check_profile(
    config: MoEficationConfig, sites: list[FfnSite], sizes: list[tuple[int, int]], profile: ModelProfile
) -> None:
    """Check that a profile is of these FFNs, has a sample, and enough tokens for what learns from it.

    Args:
        sizes: (E, m) of each FFN.

    Raises:
        CalibrationError: it is not.
    """
    if len(profile.sites) != len(sites):
        raise CalibrationError(f"the profile has {len(profile.sites)} layers, {len(sites)} are to be converted")
    for site, (experts, _), stats in zip(sites, sizes, profile.sites, strict=True):
        if len(stats.active) != site.sizes[1]:
            raise CalibrationError(
                f"the profile is of another model: {len(stats.active)} neurons, {site.name} has {site.sizes[1]}"
            )
        if stats.inputs is None:
            raise CalibrationError(
                f"the profile holds no sample of the inputs of {site.name}: none was kept, or it was closed"
            )
        needed = {"router " + repr(config.router): tokens_needed(site.sizes[0], experts - config.shared_experts)}
        if not ROUTERS[config.router].trainable:
            needed.clear()
        if SPLITTERS[config.splitter].needs_profile:
            needed["splitter " + repr(config.splitter)] = site.sizes[1]
        for what, tokens in needed.items():
            if stats.tokens < tokens:
                raise CalibrationError(
                    f"calibration is too small: {stats.tokens} tokens reached {site.name}, "
                    f"{what} needs at least {tokens}"
                )


@torch.no_grad()
def check_predictions(model: PreTrainedModel, batches: list[Mapping[str, Any]]) -> None:
    """Find out before anything is changed that a model's predictions cannot be compared, as sensitivity does.

    Raises:
        CalibrationError: there are none, none that counts, or some that are not finite.
    """
    remedy = 'select with "allocation": "angular" or "uniform" instead of "sensitivity"'
    try:
        counted = 0
        for batch in batches:
            logits = predictions(model, batch)[0]
            if not usable(logits).all():
                raise CalibrationError(f"the model's predictions on calibration data are not finite: {OVERFLOW}")
            counted += len(logits)
    except ValueError as error:
        raise CalibrationError(f"{error}; or {remedy}") from error
    if not counted:
        raise CalibrationError(f"no position of the calibration data counts, all its labels are -100: {remedy}")


def _headless(model: PreTrainedModel) -> bool:
    cls = type(model) if is_moefied(model) else moefied_class(type(model), model.config)
    if cls._auto_class is None:  # a class of the user that is not registered
        return model.base_model is model
    return cls._auto_class in ("AutoModel", "AutoModelForTextEncoding")


def with_allocation(config: MoEficationConfig, model: PreTrainedModel, data: bool) -> MoEficationConfig:
    """Return the settings with allocation "auto" decided.

    It is "sensitivity" where there is data and a head, and the weights are in memory.
    """
    if config.allocation != AUTO or config.threshold is not None:
        return config
    if not data or isinstance(config.k, list | tuple):
        return replace(config, allocation="uniform")
    if is_offloaded(model):
        logger.warning_once('budgets are uniform: "sensitivity" would read all offloaded weights some hundred times')
        return replace(config, allocation="uniform")
    if _headless(model):
        logger.warning_once(f"{type(model).__name__} predicts nothing to measure sensitivity by: budgets are uniform")
        return replace(config, allocation="uniform")
    return replace(config, allocation="sensitivity")
