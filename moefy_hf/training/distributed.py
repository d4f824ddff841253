"""Split the neurons of a model that is being trained: found by one process, done by all."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
import torch.distributed as dist
from accelerate.optimizer import AcceleratedOptimizer
from transformers import PreTrainedModel

from ..config import MoEficationConfig
from ..conversion.budgets import COMPARING_PREDICTIONS
from ..conversion.checks import check_predictions, check_profile
from ..conversion.permute import moments, permute_neurons_
from ..conversion.pipeline import find_experts_
from ..measure.profile import profile
from ..modeling.ffn_sites import FfnSite
from ..modeling.section import ALL_EXPERTS, Section


def split_everywhere_(
    model: PreTrainedModel,
    config: MoEficationConfig,
    batches: Iterable[Mapping[str, Any]],
    optimizer: torch.optim.Optimizer,
    progress: bool,
) -> str:
    """Find the experts of a model that has routers on the first process, and give every process the same.

    Neurons are permuted in place with what each process' optimizer remembers of them. All experts are selected
    afterwards.

    Args:
        batches: calibration data; read by the first process only, and only where a method learns from it.
        config: its allocation is decided; what that measures is measured here.

    Returns:
        a line of what was found.
    """
    model.set_selection(**ALL_EXPERTS)
    found: list[Any] = [None]
    first = not dist.is_initialized() or dist.get_rank() == 0
    if first:
        try:
            found = [split_here_(model, config, batches, optimizer, progress)]
        except Exception as error:  # the other processes wait: they must hear of it
            found = [error]
    if dist.is_initialized():
        dist.broadcast_object_list(found, src=0)
    if isinstance(found[0], Exception):
        raise found[0]
    orders, routers, section, report = found[0]
    if not first:
        for site, order, weights in zip(model.moe_sites(), orders, routers, strict=True):
            permute_neurons_(site, order, optimizer)
            site.act.router.load_state_dict(weights)
        adopt(model, section)
    return report


def split_here_(
    model: PreTrainedModel,
    config: MoEficationConfig,
    batches: Iterable[Mapping[str, Any]],
    optimizer: torch.optim.Optimizer,
    progress: bool,
) -> tuple[list[torch.Tensor], list[dict[str, torch.Tensor]], dict[str, Any], str]:
    """Split this process' model: (orders of neurons, router weights, section of the config, what was found)."""
    sites, section = model.moe_sites(), Section(model.config)
    sizes = [(site.act.num_experts, site.act.expert_size) for site in sites]
    with ExitStack() as stack:
        stats = None
        if config.needs():
            tokens, layers = config.calibration_tokens, config.layers
            stats = profile(model, batches, max_tokens=tokens, layers=layers, progress=progress)
            stack.enter_context(stats)
            check_profile(config, sites, sizes, stats)
            if config.allocation in COMPARING_PREDICTIONS:
                check_predictions(model, stats.batches)
        warm = bool(section.splits)
        found = find_experts_(model, config, stats, optimizer=optimizer, warm=warm, progress=progress)
    report, fits = f"{len(sites)} FFNs split, {sizes[0][0]} experts of {sizes[0][1]} neurons in the first", found.fits
    if fits:
        captured, oracle = (sum(getattr(fit, name) for fit in fits) / len(fits) for name in ("captured", "oracle"))
        report += f"; routers find {captured:.1%} of what the best {fits[0].k} experts do, an oracle {oracle:.1%}"
    routers = [{key: value.cpu() for key, value in site.act.router.state_dict().items()} for site in sites]
    return [order.cpu() for order in found.orders], routers, section.values, report


def check_optimizer(sites: Iterable[FfnSite], optimizer: torch.optim.Optimizer) -> None:
    """Find out before training whether what the optimizer will remember of neurons can be permuted with them.

    By a step of its kind on a stand-in for the largest matrix: optimizers remember nothing before their first step.

    Raises:
        ValueError: it cannot (Adafactor, 8-bit optimizers).
    """
    own = optimizer.optimizer if isinstance(optimizer, AcceleratedOptimizer) else optimizer
    groups = {id(param): group for group in own.param_groups for param in group["params"]}
    owned = [(f"{site.name}.{name}", param) for site in sites for name, param, _, _ in site.neuron_dims()]
    trained = [(name, param) for name, param in owned if id(param) in groups]
    if not trained:
        return
    name, param = max(trained, key=lambda each: each[1].numel())
    if own.state.get(param):
        moments(own, param, name)
        return
    stand_in = torch.nn.Parameter(param.detach().clone())
    stand_in.grad = param.detach().clone()
    twin = object.__new__(type(own))
    twin.__dict__.update(
        {key: value for key, value in vars(own).items() if key != "step"}
    )  # a scheduler's, bound to own
    twin.state, twin.param_groups = defaultdict(dict), [{**groups[id(param)], "params": [stand_in]}]
    type(own).step(twin)
    moments(twin, stand_in, name)


def adopt(model: PreTrainedModel, section: Mapping[str, Any]) -> None:
    """Let a model route as a section of a config says."""
    Section(model.config).replace(section)
    model.set_selection()
