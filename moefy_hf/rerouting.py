"""Give a converted model routers of another kind, to compare them on one split."""

from transformers import PreTrainedModel

from .architectures import check_moefied
from .conversion import init_routers_
from .modeling.moefied import new_router
from .modeling.routers import ROUTERS
from .modeling.selection import SELECTIONS
from .profiling import ModelProfile, check_sample
from .router_fitting import RouterFit, fit_routers

OF_ROUTERS = ("reach", "sensitivity")  # what a config holds of measurements with the routers that a model had


def reroute_(
    model: PreTrainedModel, router: str, profile: ModelProfile | None = None, *, seed: int = 0, progress: bool = True
) -> list[RouterFit]:
    """Replace all routers of a MoEfied model, in place, by ones of another kind; the experts stay what they are.

    What was measured with the old ones (what dynamic selections spend, sensitivity, means of dropped experts) is
    forgotten.

    Args:
        router: of `ROUTERS`.
        profile: of this model's routed FFNs, with a sample, which the routers are fitted on; not needed by kinds that
            are not trained.
        seed: of the weights that routers begin with, and of the order of tokens in their fit.

    Returns:
        how well each layer's router finds its experts; empty without a profile.

    Raises:
        ValueError: the model is not MoEfied, an unknown router (the valid ones are listed), one that is fitted and no
            profile or one that is too small, or a selection that depends on what was measured. The model is unchanged
            then.
    """
    check_moefied(model)
    if router not in ROUTERS:
        raise ValueError(f"unknown router {router!r}; choose from {', '.join(ROUTERS)}")
    section, sites = model.config.moefication, model.moe_sites()
    selection = section["selection"]
    budget = "k" in selection and SELECTIONS[selection["type"]].dynamic
    if budget or selection.get("allocation") in OF_ROUTERS or section.get("compensation"):
        raise ValueError(
            f"{dict(selection)} depends on what was measured with the old routers: first "
            'model.set_selection(type="top_k", k=..., allocation="uniform"), and no compensation'
        )
    if profile is None and ROUTERS[router].trainable:
        free = ", ".join(name for name, cls in ROUTERS.items() if not cls.trainable)
        raise ValueError(f"router {router!r} is fitted to data: give a profile, or choose from {free}")
    if profile is not None:
        check_sample(sites, profile)
    before = [site.act.router for site in sites]
    try:
        for site in sites:
            site.act.router = new_router(router, site, site.act.num_experts, site.act.shared)
        init_routers_(model, seed)
        fits = fit_routers(model, profile, seed=seed, progress=progress) if profile is not None else []
    except BaseException:
        for site, old in zip(sites, before, strict=True):
            site.act.router = old
        raise
    section["router"] = router
    for measured in OF_ROUTERS:
        section.pop(measured, None)
    return fits
