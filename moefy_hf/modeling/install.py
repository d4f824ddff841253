"""Put routed activations and routers into a model, as `config.moefication` says."""

import importlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from .errors import MoefyError
from .ffn_sites import FfnSite, find_sites, stacks_of
from .routed_activation import FollowReplacements, RoutedActivation, is_routed
from .router_base import Router
from .routers import ROUTERS, router_class
from .section import FORMAT_VERSION, Section
from .selection_config import resolve_selection


def split_sizes(site: FfnSite, num_experts: int | None, expert_size: int | None) -> tuple[int, int]:
    """Return (E, m) of one FFN: the number of experts, and the neurons of each.

    Args:
        site: the FFN.
        num_experts: E, which is used where both are given.
        expert_size: m.

    Raises:
        MoefyError: the neurons do not divide evenly; the nearest sizes that do are named.
    """
    neurons = site.sizes[1]
    number = num_experts if num_experts is not None else expert_size
    unit = "experts" if num_experts is not None else "experts of size"
    if not isinstance(number, int) or isinstance(number, bool) or not 1 <= number <= neurons or neurons % number:
        divisors = [n for n in range(1, neurons + 1) if neurons % n == 0]
        near = sorted(divisors, key=lambda n: abs(n - number) if isinstance(number, int) else n)[:4]
        raise MoefyError(
            f"{site.name}: {neurons} neurons do not split into {unit} {number!r}; nearby divisors: "
            f"{', '.join(map(str, sorted(near)))}"
        )
    return (number, neurons // number) if num_experts is not None else (neurons // number, number)


def install_(model: PreTrainedModel) -> None:
    """Put a routed activation into every FFN that `config.moefication` names.

    Raises:
        MoefyError: the config has no such section, one of a newer format, or one that does not fit the model.
    """
    section = Section.of(model.config)
    if section is None:
        raise MoefyError(
            f"{type(model).__name__} needs a `moefication` section in its config; "
            "convert a dense model with moefy_hf.moefy_"
        )
    if section.format_version > FORMAT_VERSION:
        raise MoefyError(
            f"this checkpoint has moefication format {section.format_version}, newer than {FORMAT_VERSION}: "
            "upgrade moefy-hf"
        )
    kind, settings = section.router, section.router_settings
    router_class(kind, settings)  # finds what is wrong with them first
    sites = find_sites(model, section.towers)
    if not section.ffns:  # of a checkpoint that is older than this key; what was found travels on with it
        section.ffns = importlib.import_module("moefy_hf.discovery.sites").remembered(model, sites)
    sites = selected_sites(sites, section.layers)
    sizes = [split_sizes(site, section.num_experts, section.expert_size) for site in sites]
    shared = section.shared_experts
    check_shared(shared, sites, sizes)
    selections = resolve_selection(section.selection, [experts for experts, _ in sizes], section, shared)
    for site, (num_experts, expert_size), selection in zip(sites, sizes, selections, strict=True):
        if is_routed(site.act):  # a subclass called post_init again, as transformers' classes may
            continue
        router = new_router(kind, site, num_experts, shared, settings)
        routed = RoutedActivation(site.act, router, expert_size, selection, shared, inline=not site.has_act)
        site.replace_act(routed)
        routed.connect_(site.first)
        if section.compensation:
            routed.compensate_(torch.zeros(site.sizes[1]))
        if section.neuron_order:
            routed.register_buffer("neuron_order", torch.full((site.sizes[1],), -1, dtype=torch.int32))
        follow = FollowReplacements(routed, site)
        follow(site.owner, ())
        routed.handles += [site.owner.register_forward_pre_hook(follow)]
        routed.handles += [site.owner.register_forward_hook(BypassGuard(routed, site.name))]
    connect_routers_(model, sites)


def uninstall_(site: FfnSite) -> None:
    """Put an FFN's own activation back, and remove what was attached to it."""
    if not is_routed(routed := site.act):
        return
    for handle in (*routed.handles, routed.tap, routed.outlet):
        if handle is not None:
            handle.remove()
    if routed.inline:
        parent, _, child = site.spec.act.rpartition(".")
        delattr(site.owner.get_submodule(parent), child)
    else:
        site.replace_act(routed.inner)


def new_router(
    name: str, site: FfnSite, num_experts: int, shared: int, settings: Mapping[str, Any] | None = None
) -> Router:
    """Return a new router for an FFN, frozen, in float32 and not initialised.

    Args:
        name: one of `ROUTERS`.
        site: the FFN.
        num_experts: E, the shared experts included.
        shared: number of experts that always run, and are not routed to.
        settings: of the router.
    """
    router = router_class(name, settings).of(site.weights(), num_experts - shared, **(settings or {}))
    router.read_from_(site.weights, shared)
    return freeze_(router.float())  # whatever type a model is made in: as `from_pretrained` has them


def freeze_(router: Router) -> Router:
    """Freeze a router, and return it.

    Routers are trained only where their loss is on: an unused trainable parameter stalls DDP, weight decay shrinks it,
    and FSDP wants one type for all it trains.
    """
    return router.requires_grad_(False)


def connect_routers_(model: PreTrainedModel, sites: list[FfnSite]) -> None:
    """Connect routers that pass scores to those of later layers.

    Args:
        model: the model.
        sites: its routed FFNs.

    Raises:
        MoefyError: the layers of a stack have different numbers of experts, and one router for all.
    """
    for stack, members in stacks_of(sites).items():
        routed = [site.act for site in members]
        type(routed[0].router).connect_stack_(routed, model.get_submodule(stack), members[0].name)
    connect_checkpointing_(model)
    # FSDP wraps these, and nothing within: routers apart, whose type and training differ from the layer's. Not those
    # that hand scores on, which look for each other
    classes = {type(site.act.router) for site in sites if next(site.act.router.parameters(), None) is not None}
    named = {cls.__name__ for cls in classes if not cls.serves_stack}
    known_routers = {cls.__name__ for cls in ROUTERS.values()}
    others = {name for name in model._no_split_modules or () if name not in known_routers}
    model._no_split_modules = others | named


def connect_checkpointing_(model: nn.Module) -> None:
    """Let the gradient checkpointing that transformers gave the layers carry what their routers hand on."""
    for cls in {type(module) for module in model.modules() if isinstance(module, Router)}:
        cls.connect_checkpointing_(model)


def check_shared(shared: int, sites: list[FfnSite], sizes: list[tuple[int, int]]) -> None:
    """Check a number of shared experts.

    Args:
        shared: the number.
        sites: the FFNs.
        sizes: (E, m) of each.

    Raises:
        MoefyError: it is no number, or no routed expert would be left.
    """
    for site, (experts, _) in zip(sites, sizes, strict=True):
        if not isinstance(shared, int) or isinstance(shared, bool) or not 0 <= shared < experts:
            raise MoefyError(f"{site.name}: shared_experts={shared!r} must be from 0 to {experts - 1} of {experts}")


def selected_sites(sites: list[FfnSite], layers: list[int] | None) -> list[FfnSite]:
    """Return the FFNs that are converted: all of them, or those at the given positions.

    Raises:
        MoefyError: `layers` is empty, or has a position that is none.
    """
    if layers is None:
        return sites
    if not layers or any(isinstance(i, bool) or not isinstance(i, int) or not 0 <= i < len(sites) for i in layers):
        raise MoefyError(f"layers={layers} must be a non-empty list of FFN positions from 0 to {len(sites) - 1}")
    return [sites[i] for i in sorted(set(layers))]


class BypassGuard:
    """Raises where an FFN ran without its routed activation; it is a forward hook of the FFN's owner.

    A fused MLP kernel that never calls the activation would silently be dense.

    Args:
        routed: the FFN's activation.
        name: of the FFN.
    """

    def __init__(self, routed: RoutedActivation, name: str):
        self.routed, self.name = routed, name

    def __call__(self, owner: nn.Module, args: tuple, output: Any) -> None:
        observed = self.routed.observed
        if observed.x is not None or observed.kept is not None:
            observed.x = observed.kept = None
            raise RuntimeError(f"{self.name}: the activation of this routed FFN never ran; disable fused MLP kernels")
