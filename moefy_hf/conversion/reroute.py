"""Give a converted model routers of another kind, to compare them on one split."""

from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedModel

from ..conversion.permute import permute_neurons_
from ..errors import MoefyError
from ..loading import MoefiedModel, check_moefied
from ..measure.profile import ModelProfile, check_sample
from ..modeling.ffn_sites import FfnSite
from ..modeling.install import connect_routers_, new_router
from ..modeling.routers import ROUTERS, router_class
from ..modeling.section import FORMAT_VERSION, MEASURED_WITH_ROUTERS, Section
from ..modeling.selection import SELECTIONS
from .expert_matching import check_matchable, matched_orders
from .fit_routers import RouterFit
from .pipeline import start_routers_


def reroute_(
    model: PreTrainedModel,
    router: str,
    profile: ModelProfile | None = None,
    *,
    settings: Mapping[str, Any] | None = None,
    seed: int = 0,
    progress: bool = True,
) -> list[RouterFit]:
    """Replace all routers of a MoEfied model, in place, by ones of another kind.

    The experts stay what they are, but for their order where one router is to choose for all layers.

    What was measured with the old ones (what dynamic selections spend, sensitivity, means of dropped experts) is
    forgotten.

    Args:
        router: of `ROUTERS`.
        profile: of this model's routed FFNs, with a sample, which the routers are fitted on; not needed by kinds that
            are not trained.
        settings: as `MoEficationConfig(router_settings=...)`.
        seed: of the weights that routers begin with, and of the order of tokens in their fit.

    Returns:
        how well each layer's router finds its experts; empty without a profile.

    Raises:
        MoefyError: the model is not MoEfied, an unknown router or setting (the valid ones are listed), a router that
            is fitted and no profile or one that is too small, one router for layers with different numbers of experts
            or with code that came with a checkpoint, or a selection that depends on what was measured. The model is
            unchanged then.

    Example:
        >>> with profile(model, batches) as sample:
        ...     fits = reroute_(model, "low_rank", sample, settings={"rank": 64})
    """
    model = check_moefied(model)
    check_reroutable(model, router, profile, settings)
    section, sites = Section(model.config), model.moe_sites()
    experts, as_they_are = [site.act.num_experts for site in sites], [torch.arange(site.sizes[1]) for site in sites]
    orders = matched_orders(router, sites, as_they_are, experts, profile, sites[0].act.shared)
    before, moved = [site.act.router for site in sites], list[tuple[FfnSite, torch.Tensor]]()
    try:
        for site, order, old in zip(sites, orders, as_they_are, strict=True):
            if order is not old:
                permute_neurons_(site, order)
                moved.append((site, order))
        for site in sites:
            site.act.router = new_router(router, site, site.act.num_experts, site.act.shared, settings)
        connect_routers_(model, sites)
        fits = start_routers_(model, profile, seed, progress=progress)
    except BaseException:
        for site, old in zip(sites, before, strict=True):
            site.act.router = old
        for site, order in moved:
            permute_neurons_(site, order.argsort())
        raise
    section.router, section.router_settings, section.format_version = router, dict(settings or {}), FORMAT_VERSION
    section.forget(MEASURED_WITH_ROUTERS)
    return fits


def check_reroutable(
    model: MoefiedModel,
    router: str,
    profile: ModelProfile | None = None,
    settings: Mapping[str, Any] | None = None,
) -> None:
    """
    Raises:
        MoefyError: see `reroute_`.
    """
    router_class(router, settings)
    section, sites = Section(model.config), model.moe_sites()
    selection = section.selection
    budget = "k" in selection and SELECTIONS[selection["type"]].dynamic
    if budget or selection.get("allocation") in MEASURED_WITH_ROUTERS or section.compensation:
        raise MoefyError(
            f"{dict(selection)} depends on what was measured with the old routers: first "
            'model.set_selection(type="top_k", k=..., allocation="uniform"), and no compensation'
        )
    if profile is None and ROUTERS[router].trainable:
        free = ", ".join(name for name, cls in ROUTERS.items() if not cls.trainable)
        raise MoefyError(f"router {router!r} is fitted to data: give a profile, or choose from {free}")
    if profile is not None:
        check_sample(sites, profile)
    check_matchable(router, sites, [site.act.num_experts for site in sites])
