"""The one pipeline from neurons to experts with routers; `moefy_`, the callback and `reroute_` share it."""

import copy
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel

from ..config import MoEficationConfig
from ..conversion.permute import check_permutation, permute_neurons_
from ..discovery.sites import remembered
from ..loading import MoefiedModel, check_moefied, moefied_class
from ..measure.processes import ALONE, Processes
from ..measure.profile import ModelProfile, SiteProfile
from ..modeling.adapters import IN_MEMORY
from ..modeling.ffn_sites import FfnSite, find_sites
from ..modeling.ffn_weights import FfnWeights
from ..modeling.install import install_, split_sizes, uninstall_
from ..modeling.moefied import is_moefied
from ..modeling.section import ALL_EXPERTS, Section
from ..modeling.selection_config import setting_name
from ..splitters import SPLITTERS
from ..splitters.shared_experts import activation_rates, apart
from .budgets import MEASURES
from .equality import DenseReference
from .expert_matching import matched_orders
from .fit_routers import RouterFit, fit_routers_
from .thresholds import calibrate_thresholds_
from .work import Found, Work, each_layer

_MADE: set[type[PreTrainedModel]] = set()  # MoEfied classes of which this process has made a model


@dataclass
class Experts:
    """What `find_experts_` found: for each FFN the order of its neurons (f,) and how well its router was fitted, and
    the seconds that each step took. `fits` is empty without a profile."""

    orders: list[torch.Tensor] = field(default_factory=list)
    fits: list[RouterFit] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)


@contextmanager
def timed(seconds: dict[str, float], step: str) -> Iterator[None]:
    """Note the seconds that a step takes."""
    started = time.perf_counter()
    yield
    seconds[step] = time.perf_counter() - started


def find_experts_(
    model: PreTrainedModel,
    sites: list[FfnSite],
    config: MoEficationConfig,
    profile: ModelProfile | None,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    warm: bool = False,
    work: Work | None = None,
    progress: bool = True,
    processes: Processes = ALONE,
) -> Experts:
    """Split the neurons of a model, in place, fit its routers, and measure what its selection needs.

    A dense model gets routers once the split is known: until then nothing is changed. All experts are selected
    afterwards, so that the model computes what it did.

    Args:
        sites: the FFNs to split, all that are routed where the model is MoEfied.
        config: its allocation is decided, not "auto" (`with_allocation`).
        profile: of this model, with a sample; None where nothing in `config.needs()`.
        optimizer: what it remembers of neurons is permuted with them.
        warm: the neurons lie in experts already; a split that cannot be improved on from there is kept.
        work: keeps what is found layer by layer, and has what was found.
        processes: that share the work, each with the same model and profile.
    """
    result = Experts()
    options: dict[str, Any] = {"work": work, "progress": progress, "processes": processes}
    with timed(result.seconds, "split"):
        moefied = check_moefied(model) if is_moefied(model) else None
        result.orders = neuron_orders(sites, config, profile, warm=warm, **options)
        with restored_on_error(model, sites):
            reference = DenseReference(model, sites, profile)
            if moefied is None:
                moefied = install_checked_(model, config, reference)
            permute_checked_(moefied.moe_sites(), result.orders, optimizer, reference)
    with timed(result.seconds, "routers"):
        result.fits = start_routers_(moefied, profile, config.seed, **options)
        kind = config.selection_section()["type"]
        if profile is not None and setting_name(kind):
            calibrate_thresholds_(moefied, profile, [kind])
    if profile is not None and config.allocation in MEASURES:
        with timed(result.seconds, "budgets"):
            measure = MEASURES[config.allocation]
            measured = measure(moefied, profile.batches, progress=progress, processes=processes)
            Section(moefied.config).set_measured(config.allocation, measured)
    return result


@contextmanager
def restored_on_error(model: PreTrainedModel, sites: list[FfnSite]) -> Iterator[None]:
    """Make a model dense again, as it was, if putting routers into it fails; a MoEfied one stays MoEfied."""
    dense, cls, name = not is_moefied(model), type(model), model.name_or_path
    no_split, settings = model._no_split_modules, dict(vars(model.config))
    try:
        yield
    except Exception:
        if not dense:
            raise
        for site in sites:
            uninstall_(site)
        model.__class__, model._no_split_modules = cls, no_split
        vars(model.config).clear()
        vars(model.config).update(settings)
        model.name_or_path = name
        raise


def install_checked_(model: PreTrainedModel, config: MoEficationConfig, reference: DenseReference) -> MoefiedModel:
    """Put routers into a dense model, and check that it computes what it did; return the same object.

    Raises:
        UnsupportedModel: all experts together are not the dense model.
    """
    moefied = install_routers_(model, config.section())
    reference.compare("routers were put into its FFNs")
    return moefied


def install_alone_(model: PreTrainedModel, config: MoEficationConfig, sites: list[FfnSite]) -> None:
    """Put routers into a dense model whose neurons are split later, checked on a batch that is made up.

    Raises:
        UnsupportedModel: all experts together are not the dense model, which is as it was then.
    """
    with restored_on_error(model, sites):
        install_checked_(model, config, DenseReference(model, sites, None))


def permute_checked_(
    sites: list[FfnSite],
    orders: list[torch.Tensor],
    optimizer: torch.optim.Optimizer | None,
    reference: DenseReference,
) -> None:
    """Permute the neurons of all FFNs, with what an optimizer remembers of them, or of none.

    Raises:
        UnsupportedModel: all experts together are no longer what they were; neurons are back in their places then.
    """
    permuted = 0
    try:
        for site, order in zip(sites, orders, strict=True):
            permute_neurons_(site, order, optimizer)
            permuted += 1
        reference.compare("its neurons were permuted")
    except Exception:
        for site, order in zip(sites[:permuted], orders, strict=False):
            permute_neurons_(site, order.argsort(), optimizer)
        raise


def start_routers_(model: MoefiedModel, profile: ModelProfile | None, seed: int, **options: Any) -> list[RouterFit]:
    """Start every router from the experts that its FFN has now, in place, and fit those that learn from a profile.

    Args:
        options: of `fit_routers_`.
    """
    init_routers_(model, seed)
    return fit_routers_(model, profile, seed=seed, **options) if profile is not None else []


def neuron_orders(
    sites: list[FfnSite],
    config: MoEficationConfig,
    profile: ModelProfile | None,
    *,
    warm: bool = False,
    work: Work | None = None,
    progress: bool = False,
    processes: Processes = ALONE,
) -> list[torch.Tensor]:
    """Find one order of neurons (f,) per FFN, expert by expert, as `config.splitter` groups them; change nothing.

    Corresponding experts have the same place in all layers where `config.router` chooses for all of them.
    """
    orders: dict[int, torch.Tensor] = {}
    num_experts = [split_sizes(site, config.num_experts, config.expert_size)[0] for site in sites]

    def split(position: int) -> Found:
        site, stats = sites[position], profile.sites[position] if profile else None
        generator = torch.Generator().manual_seed(config.seed + position)
        with torch.autocast(site.device.type, enabled=False):  # half-precision sums scramble a split
            order = neuron_order(site.weights(), stats, num_experts[position], config, generator, warm)
        return {"order": order}, {}

    def take(position: int, split: Found) -> None:
        orders[position] = split[0]["order"]
        check_permutation(sites[position], orders[position])

    each_layer("order", len(sites), split, take, work=work, processes=processes, progress=progress)
    in_order = [orders[position] for position in range(len(sites))]
    return matched_orders(config.router, sites, in_order, num_experts, profile, config.shared_experts)


def neuron_order(
    weights: FfnWeights,
    stats: SiteProfile | None,
    experts: int,
    config: MoEficationConfig,
    generator: torch.Generator,
    warm: bool,
) -> torch.Tensor:
    """Order the neurons (f,) of one FFN: shared experts first, then the others as the splitter groups them."""
    split, shared = SPLITTERS[config.splitter].order, config.shared_experts
    if not shared or stats is None:
        return split(weights, stats, experts, generator, warm)
    f = weights.down.shape[1]
    first = torch.arange(shared * f // experts)
    if not warm:  # those that are shared already stay so
        first = activation_rates(weights, stats).sort(descending=True, stable=True).indices[: len(first)].sort().values
    others = torch.ones(f, dtype=torch.bool).index_fill(0, first, False).nonzero()[:, 0]
    return torch.cat([first, others[split(*apart(weights, stats, others), experts - shared, generator, warm).cpu()]])


def install_routers_(model: PreTrainedModel, section: dict[str, Any]) -> MoefiedModel:
    """Change a dense model's class and put routers into it that select everything; return the same object.

    Its function stays what it was.
    """
    view = Section.put(model.config, section)
    view.selection, view.compensation, view.neuron_order = dict(ALL_EXPERTS), False, True
    view.ffns = remembered(model, find_sites(model, view.towers))
    model.__class__ = moefied_class(type(model), model.config)
    if type(model) not in _MADE:  # transformers learns which outputs a class can record when one is made
        with torch.device("meta"):
            type(model)(copy.deepcopy(model.config))
        _MADE.add(type(model))
    install_(model)
    if not (model.name_or_path or "").endswith(IN_MEMORY):
        model.name_or_path = (model.name_or_path or "") + IN_MEMORY  # by which adapters know what they are trained on
    moefied = check_moefied(model)
    for site in moefied.moe_sites():
        site.act.neuron_order.copy_(torch.arange(site.sizes[1]))
    moefied.set_auto_map_()
    init_routers_(moefied, view.seed)
    return moefied


def init_routers_(model: MoefiedModel, seed: int) -> None:
    """Start every router from the experts that its FFN has now."""
    generator = torch.Generator().manual_seed(seed)
    for site in model.moe_sites():
        router = site.act.router
        with torch.no_grad():
            for weight in router.parameters():
                noise = torch.empty(weight.shape).normal_(std=weight.shape[-1] ** -0.5, generator=generator)
                weight.copy_(noise)  # the same on every device
            first = site.act.shared * site.act.expert_size
            router.init_from_experts_(site.weights().of_neurons(torch.arange(first, site.sizes[1])))
        site.act.to(site.device)
        site.act.train(site.owner.training)
