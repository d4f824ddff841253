"""`moefy_`: a dense model becomes its MoEfied self, in place."""

import copy
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel
from transformers.utils import logging

from ..config import MoeficationConfig
from ..io import is_hub_id
from ..loading import moefied_class
from ..measure.profile import ModelProfile, NotFiniteError, SiteProfile, profile
from ..modeling.adapters import IN_MEMORY
from ..modeling.allocation import setting_name
from ..modeling.ffn_sites import FfnSite, FfnWeights, permute_neurons_
from ..modeling.moefied import install_
from ..splitters import SPLITTERS
from ..splitters.shared_experts import activation_rates, apart
from .budgets import COMPARING_PREDICTIONS, MEASURES
from .checks import check_convertible, check_predictions, check_profile, default_allocation, users_of_data
from .compensation import compensate_
from .expert_matching import matched_orders
from .fit_routers import RouterFit, fit_routers
from .thresholds import measure_reach

logger = logging.get_logger("moefy_hf")


@dataclass
class ConversionReport:
    """What a conversion did. `fits` is empty where no router could be measured (no calibration data); `base_model` is
    the Hub id that the dense model was loaded by, if it was."""

    experts: list[int]
    expert_sizes: list[int]
    k: list[float | None]
    calibration_tokens: int
    sparsity: list[float]
    fits: list[RouterFit]
    seconds: dict[str, float] = field(default_factory=dict)
    base_model: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def table(self) -> str:
        """A Markdown table, a line per FFN: sizes, budget, and how well its router finds the experts that matter."""
        lines = ["| FFN | experts | k | not active | captured | oracle | random |", "|---|---|---|---|---|---|---|"]
        for position, (experts, size, k) in enumerate(zip(self.experts, self.expert_sizes, self.k, strict=True)):
            cells = [str(position), f"{experts} of {size}", "?" if k is None else f"{k:.4g}"]
            if self.fits:
                fit = self.fits[position]
                cells += [f"{share:.1%}" for share in (self.sparsity[position], fit.captured, fit.oracle, fit.random)]
            lines.append("| " + " | ".join(cells + [""] * (7 - len(cells))) + " |")
        return "\n".join(lines)


def moefy_(
    model: PreTrainedModel,
    config: MoeficationConfig | None = None,
    calibration: Iterable[Mapping[str, Any]] | ModelProfile | None = None,
    *,
    progress: bool = True,
) -> ConversionReport:
    """MoEfy a dense model in place: profile, split, route, select. The same Python object, now of its Moefied class.

    Parameters stay where they are; neurons are permuted, and routers are added (MoEfication, section 3).

    Args:
        calibration: model-ready batches (mappings of tensors), shuffled; or a profile of this model, made with
            `profile`, to convert copies of it in several ways. Methods that learn nothing from data (splits "random",
            "parameter_clustering" and "gate_clustering" with routers that are not fitted) work without.

    Raises:
        ValueError: unsupported, already MoEfied, wrapped, adapted or sharded model, part of a larger one, settings
            that do not fit it, or missing, too little or not finite calibration data. The model is unchanged then.
    """
    config = config or MoeficationConfig()
    sites, sizes = check_convertible(model, config, calibration)
    section, base_model = config.section(), model.name_or_path or ""
    selection = section["selection"]
    if "k" in selection:
        selection.setdefault("allocation", default_allocation(model, config, calibration))
    allocation = selection.get("allocation", "uniform")
    seconds: dict[str, float] = {}
    with ExitStack() as stack:
        found = calibration if isinstance(calibration, ModelProfile) else None
        if calibration is not None and not isinstance(calibration, ModelProfile):
            tokens, layers = config.calibration_tokens, config.layers
            try:
                with _timed(seconds, "profile"):
                    found = profile(model, calibration, max_tokens=tokens, layers=layers, progress=progress)
                stack.enter_context(found)
            except NotFiniteError as error:
                if users_of_data(config, allocation):
                    raise
                logger.warning(f"converted without calibration, which nothing here needs: {error}")
        if found is not None:
            check_profile(config, sites, sizes, found)
        if found is not None and allocation in COMPARING_PREDICTIONS:
            check_predictions(model, found.batches)
        with _timed(seconds, "split"):
            orders = neuron_orders(sites, [experts for experts, _ in sizes], found, config, progress=progress)
            for site, order in zip(sites, orders, strict=True):
                permute_neurons_(site, order)
        install_routers_(model, section)
        for site, order in zip(model.moe_sites(), orders, strict=True):
            site.act.neuron_order.copy_(order)
        fits: list[RouterFit] = []
        if found is not None:
            with _timed(seconds, "routers"):
                fits = fit_routers(model, found, seed=config.seed, progress=progress)
            if setting_name(selection["type"]):
                measure_reach(model, found, [selection["type"]])
        if found is not None and allocation in MEASURES:
            with _timed(seconds, "budgets"):
                model.config.moefication[allocation] = MEASURES[allocation](model, found.batches, progress=progress)
        model.set_selection(**selection)
        if config.compensation and found is not None:
            with _timed(seconds, "compensation"):
                compensate_(model, found, progress=progress)
    return ConversionReport(
        experts=[experts for experts, _ in sizes],
        expert_sizes=[size for _, size in sizes],
        k=[site.act.k for site in model.moe_sites()],
        calibration_tokens=found.tokens if found else 0,
        sparsity=[stats.sparsity for stats in found.sites] if found else [],
        fits=fits,
        seconds=seconds,
        base_model=base_model if is_hub_id(base_model) else None,
    )


@contextmanager
def _timed(seconds: dict[str, float], what: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    seconds[what] = time.perf_counter() - started


def neuron_orders(
    sites: list[FfnSite],
    num_experts: list[int],
    found: ModelProfile | None,
    config: MoeficationConfig,
    warm: bool = False,
    progress: bool = False,
) -> list[torch.Tensor]:
    """One order of neurons (f,) per FFN, expert by expert, as `config.splitter` groups them, and corresponding experts
    at the same place in all layers where `config.router` chooses for all of them; nothing is changed.

    warm: the neurons lie in experts already; a split that cannot be improved on from there is kept.
    """
    orders = []
    bar = tqdm(sites, desc="split", unit="layer", disable=not progress)
    for position, (site, experts) in enumerate(zip(bar, num_experts, strict=True)):
        generator = torch.Generator().manual_seed(config.seed + position)
        stats = found.sites[position] if found else None
        with torch.autocast(site.down.weight.device.type, enabled=False):  # half-precision sums scramble a split
            orders.append(neuron_order(site.weights(), stats, experts, config, generator, warm))
    return matched_orders(config.router, sites, orders, num_experts, found, config.shared_experts)


def neuron_order(
    weights: FfnWeights,
    stats: SiteProfile | None,
    experts: int,
    config: MoeficationConfig,
    generator: torch.Generator,
    warm: bool,
) -> torch.Tensor:
    """(f,): those of the shared experts first, then the others as the splitter groups them."""
    split, shared = SPLITTERS[config.splitter].order, config.shared_experts
    if not shared or stats is None:
        return split(weights, stats, experts, generator, warm)
    f = weights.down.shape[1]
    first = torch.arange(shared * f // experts)
    if not warm:  # those that are shared already stay so
        first = activation_rates(weights, stats).sort(descending=True, stable=True).indices[: len(first)].sort().values
    others = torch.ones(f, dtype=torch.bool).index_fill(0, first, False).nonzero()[:, 0]
    return torch.cat([first, others[split(*apart(weights, stats, others), experts - shared, generator, warm).cpu()]])


def install_routers_(model: PreTrainedModel, section: dict[str, Any]) -> None:
    """Change a dense model's class and put routers into it that select everything: its function stays what it was."""
    everything = {"type": "top_k", "k": 1.0, "allocation": "uniform"}
    model.config.moefication = {**section, "selection": everything, "compensation": False, "neuron_order": True}
    model.__class__ = moefied_class(type(model))
    with torch.device("meta"):  # transformers learns which outputs a class can record when one is made
        type(model)(copy.deepcopy(model.config))
    install_(model)
    if not (model.name_or_path or "").endswith(IN_MEMORY):
        model.name_or_path = (model.name_or_path or "") + IN_MEMORY  # by which adapters know what they are trained on
    for site in model.moe_sites():
        site.act.neuron_order.copy_(torch.arange(site.sizes[1]))
    model.config.auto_map = model.auto_map()
    init_routers_(model, section["seed"])


def init_routers_(model: PreTrainedModel, seed: int) -> None:
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
        site.act.to(site.down.weight.device)
        site.act.train(site.owner.training)
