"""`moefy_`: a dense model becomes its MoEfied self, in place."""

import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel
from transformers.utils import logging

from .architectures import moefied_class
from .budgets import measure_sensitivity
from .compensation import compensate_
from .configuration import MoeficationConfig
from .facts import is_hub_id
from .modeling.allocation import count_experts, per_layer, setting_name
from .modeling.ffn_sites import FfnSite, FfnWeights, find_sites, permute_neurons_
from .modeling.moefied import check_shared, install_, is_moefied, selected_sites, split_sizes
from .modeling.routers import ROUTERS
from .profiling import ModelProfile, SiteProfile, profile
from .quality import predictions
from .reach import measure_reach
from .router_fitting import RouterFit, fit_routers, tokens_needed
from .splitting import SPLITTERS
from .splitting.shared import activation_rates, apart

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
            `profile`, to convert copies of it in several ways. Methods that learn nothing from data (splits "random"
            and "parameter_clustering" with routers "similarity" and "random") work without.

    Raises:
        ValueError: unsupported, already MoEfied or sharded model, settings that do not fit it, or missing or too
            little calibration data. The model is unchanged then.
    """
    config = config or MoeficationConfig()
    sites, sizes = check_convertible(model, config, calibration)
    section = config.section()
    selection = section["selection"]
    if "k" in selection:
        selection.setdefault("allocation", default_allocation(model, config, calibration))
    seconds: dict[str, float] = {}
    with ExitStack() as stack:
        found = calibration if isinstance(calibration, ModelProfile) else None
        if calibration is not None and not isinstance(calibration, ModelProfile):
            tokens, layers = config.calibration_tokens, config.layers
            with _timed(seconds, "profile"):
                found = profile(model, calibration, max_tokens=tokens, layers=layers, progress=progress)
            stack.enter_context(found)
        if found is not None:
            check_profile(config, sites, sizes, found)
        if selection.get("allocation") == "sensitivity":
            check_predictions(model, found.batches)
        with _timed(seconds, "split"):
            orders = neuron_orders(sites, [experts for experts, _ in sizes], found, config, progress=progress)
            for site, order in zip(sites, orders, strict=True):
                permute_neurons_(site, order)
        install_routers_(model, section)
        fits: list[RouterFit] = []
        if found is not None:
            with _timed(seconds, "routers"):
                fits = fit_routers(model, found, seed=config.seed, progress=progress)
            if setting_name(selection["type"]):
                measure_reach(model, found, [selection["type"]])
        if selection.get("allocation") == "sensitivity":
            with _timed(seconds, "budgets"):
                model.config.moefication["sensitivity"] = measure_sensitivity(model, found.batches, progress=progress)
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
        base_model=model.name_or_path if is_hub_id(model.name_or_path or "") else None,
    )


@contextmanager
def _timed(seconds: dict[str, float], what: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    seconds[what] = time.perf_counter() - started


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
    if "k" in config.selection:
        for k, (experts, _) in zip(per_layer("k", config.selection["k"], len(sizes)), sizes, strict=True):
            count_experts(k, experts, config.shared_experts)
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
    if config.selection.get("allocation") == "sensitivity" and _headless(model):
        raise ValueError(
            f'allocation "sensitivity" compares predictions and {type(model).__name__} has no head: convert one '
            'that has, or use allocation "uniform"'
        )
    if calibration is None:
        users = []
        if SPLITTERS[config.splitter].needs_profile:
            users.append(f"splitter {config.splitter!r}")
        if ROUTERS[config.router].trainable:
            users.append(f"router {config.router!r}")
        if config.selection.get("allocation") == "sensitivity":
            users.append('allocation "sensitivity"')
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
    remedy = 'select with "allocation": "uniform" instead of "sensitivity"'
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


def neuron_orders(
    sites: list[FfnSite],
    num_experts: list[int],
    found: ModelProfile | None,
    config: MoeficationConfig,
    warm: bool = False,
    progress: bool = False,
) -> list[torch.Tensor]:
    """One order of neurons (f,) per FFN, expert by expert, as `config.splitter` groups them; nothing is changed.

    warm: the neurons lie in experts already; a split that cannot be improved on from there is kept.
    """
    orders = []
    bar = tqdm(sites, desc="split", unit="layer", disable=not progress)
    for position, (site, experts) in enumerate(zip(bar, num_experts, strict=True)):
        generator = torch.Generator().manual_seed(config.seed + position)
        stats = found.sites[position] if found else None
        with torch.autocast(site.down.weight.device.type, enabled=False):  # half-precision sums scramble a split
            orders.append(neuron_order(site.weights(), stats, experts, config, generator, warm))
    return orders


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
    model.config.moefication = {**section, "selection": everything, "compensation": False}
    model.__class__ = moefied_class(type(model))
    install_(model)
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
        router.to(site.down.weight.device)
        site.act.train(site.owner.training)
