"""Split the neurons of a model that is being trained: one process finds the split, all do it."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from accelerate.optimizer import AcceleratedOptimizer

from ..config import MoEficationConfig
from ..conversion.budgets import COMPARING_PREDICTIONS
from ..conversion.checks import check_predictions, check_profile
from ..conversion.permute import moments, permute_neurons_
from ..conversion.pipeline import find_experts_
from ..loading import MoefiedModel
from ..measure.profile import profile
from ..modeling.ffn_sites import FfnSite
from ..modeling.section import ALL_EXPERTS, Section


class Split(NamedTuple):
    """Holds what one process finds and the others are given."""

    orders: list[torch.Tensor]  # per FFN: (neurons,) the permutation
    routers: list[dict[str, torch.Tensor]]  # per FFN: state dict
    section: dict[str, Any]  # of the config
    report: str  # one line


def split_everywhere_(
    model: MoefiedModel,
    config: MoEficationConfig,
    batches: Iterable[Mapping[str, Any]],
    optimizer: torch.optim.Optimizer,
    progress: bool,
) -> str:
    """Split the neurons on the first process, and give every process the same experts and routers.

    Neurons are permuted in place, with what each process' optimizer remembers of them. All experts are selected
    afterwards.

    Args:
        model: a model that has routers, without wrappers.
        config: its allocation is decided; what that measures is measured here.
        batches: calibration data; read by the first process only, and only where a method learns from it.
        optimizer: of this process.
        progress: show progress bars.

    Returns:
        a line that says how many FFNs were split, and how well routers fit.

    Raises:
        MoefyError: calibration data that cannot be used; every process raises what the first one did.
    """
    model.set_selection(**ALL_EXPERTS)
    outcome: list[Any] = [None]
    is_first = not dist.is_initialized() or dist.get_rank() == 0
    if is_first:
        try:
            outcome = [split_here_(model, config, batches, optimizer, progress)]
        except Exception as error:  # the other processes wait: they must hear of it
            outcome = [error]
    if dist.is_initialized():
        dist.broadcast_object_list(outcome, src=0)
    split = outcome[0]
    if isinstance(split, Exception):
        raise split
    if not is_first:
        for site, order, weights in zip(model.moe_sites(), split.orders, split.routers, strict=True):
            permute_neurons_(site, order, optimizer)
            site.act.router.load_state_dict(weights)
        replace_section_(model, split.section)
    return split.report


def split_here_(
    model: MoefiedModel,
    config: MoEficationConfig,
    batches: Iterable[Mapping[str, Any]],
    optimizer: torch.optim.Optimizer,
    progress: bool,
) -> Split:
    """Split the neurons of this process' model; return what other processes need to do the same.

    Args: see `split_everywhere_`.
    """
    sites, section = model.moe_sites(), Section(model.config)
    sizes = [(site.act.num_experts, site.act.expert_size) for site in sites]
    with ExitStack() as stack:
        stats = None
        if config.needs():
            which: dict[str, Any] = {"towers": config.towers, "layers": config.layers}
            stats = profile(model, batches, max_tokens=config.calibration_tokens, progress=progress, **which)
            stack.enter_context(stats)
            check_profile(config, sites, sizes, stats)
            if config.allocation in COMPARING_PREDICTIONS:
                check_predictions(model, stats.batches)
        warm = bool(section.splits)
        experts = find_experts_(model, sites, config, stats, optimizer=optimizer, warm=warm, progress=progress)
    report, fits = (
        f"{len(sites)} FFNs split, {sizes[0][0]} experts of {sizes[0][1]} neurons in the first",
        experts.fits,
    )
    if fits:
        captured, oracle = (sum(getattr(fit, name) for fit in fits) / len(fits) for name in ("captured", "oracle"))
        report += f"; routers find {captured:.1%} of what the best {fits[0].k} experts do, an oracle {oracle:.1%}"
    routers = [{key: value.cpu() for key, value in site.act.router.state_dict().items()} for site in sites]
    return Split([order.cpu() for order in experts.orders], routers, section.values, report)


def check_optimizer(sites: Iterable[FfnSite], optimizer: torch.optim.Optimizer) -> None:
    """Check before training that what the optimizer will remember of neurons can be permuted with them.

    Optimizers remember nothing before their first step. So one of the same kind takes a step on a copy of the largest
    matrix.

    Args:
        sites: the FFNs that are going to be split.
        optimizer: of the Trainer.

    Raises:
        MoefyError: it cannot be permuted (Adafactor, 8-bit optimizers).
    """
    inner = optimizer.optimizer if isinstance(optimizer, AcceleratedOptimizer) else optimizer
    groups = {id(param): group for group in inner.param_groups for param in group["params"]}
    neuron_params = [(f"{site.name}.{name}", param) for site in sites for name, param, _, _ in site.neuron_dims()]
    trained = [(name, param) for name, param in neuron_params if id(param) in groups]
    if not trained:
        return
    name, param = max(trained, key=lambda item: item[1].numel())
    if inner.state.get(param):
        moments(inner, param, name)
        return
    copied = torch.nn.Parameter(param.detach().clone())
    copied.grad = param.detach().clone()
    trial = object.__new__(type(inner))
    # without `step`, which a scheduler has bound to the optimizer itself
    trial.__dict__.update({key: value for key, value in vars(inner).items() if key != "step"})
    trial.state, trial.param_groups = defaultdict(dict), [{**groups[id(param)], "params": [copied]}]
    type(inner).step(trial)
    moments(trial, copied, name)


def replace_section_(model: MoefiedModel, section: Mapping[str, Any]) -> None:
    """Give a model's config another section, and route as that says."""
    Section(model.config).replace(section)
    model.set_selection()
