"""The registry of routers: FFN input x -> one score per expert. A method is one class and one line of `ROUTERS`."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from .errors import MoefyError
from .router_base import Router
from .router_pre_gated import PreGatedRouter
from .routers_from_weights import AnalyticRouter, MeanGateRouter, PartialInputRouter, RandomRouter, SimilarityRouter
from .routers_trained import (
    LinearRouter,
    LowRankRouter,
    MLPRouter,
    NormRegressionRouter,
    PriorApproximateRouter,
    ReluRmsNormRouter,
    SigmoidRouter,
)

ROUTERS: dict[str, type[Router]] = {
    "linear": LinearRouter,
    "low_rank": LowRankRouter,
    "prior_approximate": PriorApproximateRouter,
    "sigmoid": SigmoidRouter,
    "mlp": MLPRouter,
    "norm_regression": NormRegressionRouter,
    "relu_rmsnorm": ReluRmsNormRouter,
    "pre_gated": PreGatedRouter,
    "analytic": AnalyticRouter,
    "mean_gate": MeanGateRouter,
    "partial_input": PartialInputRouter,
    "similarity": SimilarityRouter,
    "random": RandomRouter,
}


def router_class(name: Any, settings: Mapping[str, Any] | None = None) -> type[Router]:
    """Return the router of that name, which can be made with these settings.

    Raises:
        MoefyError: an unknown name or setting (the valid ones are listed), a setting out of range, or settings that
            have no names.
    """
    if not isinstance(name, str) or name not in ROUTERS:
        raise MoefyError(f"unknown router {name!r}; choose from {', '.join(ROUTERS)}")
    if not isinstance(settings, Mapping | None):
        raise MoefyError(f"settings of a router are a mapping like {{'rank': 64}}, got {settings!r}")
    ROUTERS[name].check_settings(settings or {})
    return ROUTERS[name]


def handed_scores(router: Router, x: torch.Tensor) -> torch.Tensor:
    """(..., d) -> (..., E): the scores of a router whose FFN runs on x now, shared with later layers of its stack."""
    scores = router(x)
    router_facts(router).hand_on(router, scores)  # older code that came with a checkpoint has no such method
    return scores


def router_facts(router: nn.Module) -> type[Router]:
    """Return the class that says what is known of a router's method.

    A model may run code that came with its checkpoint, whose classes lack newer attributes: they stand for the class
    of the same name here. Of a router that nobody here knows, `Router` says that nothing is special.
    """
    if isinstance(router, Router):
        return type(router)
    name = type(router._modules.get("original_module") or router).__name__  # which peft may have wrapped
    return next((cls for cls in ROUTERS.values() if cls.__name__ == name), Router)
