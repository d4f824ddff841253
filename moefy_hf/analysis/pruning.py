"""Prune experts: their neurons are really removed, and what is left is an ordinary, smaller checkpoint."""

import copy
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from ..discovery.towers import deciding_configs
from ..errors import MoefyError
from ..loading import MoefiedModel, check_moefied, routed
from ..measure.router_inputs import inputs_from
from ..modeling.ffn_sites import FfnSite, find_sites
from ..modeling.section import MEASURED_OF_EXPERTS, Section

# config fields that say how wide FFNs are, over all supported model types
WIDTHS = (
    "intermediate_size",
    "d_ff",
    "encoder_ffn_dim",
    "decoder_ffn_dim",
    "ffn_dim",
    "n_inner",
    "hidden_dim",
    "ffn_hidden_size",
)


def prune(model: PreTrainedModel, experts: Mapping[int, Iterable[int]]) -> PreTrainedModel:
    """Return a new model without these experts, as many in every layer.

    What is left computes what the model does while its routers select none of them. Budgets stay counts where they
    fit, so that a token costs what it did.

    Args:
        experts: `{layer: [expert, ...]}`, as `least_used` and `least_needed` return it.

    Raises:
        MoefyError: the model is not MoEfied; not every FFN is routed, or has equally many experts to prune; an expert
            does not exist or is a shared one; the routers mix experts (`mlp`), or one for all layers would lose
            different ones; or the config does not say how wide the FFNs are, or neurons depend on each other (a norm
            of them); nothing is made then.

    Example:
        smaller = prune(model, least_used(measure_load(model, stream), count=2))
        smaller.save_pretrained("smaller")
    """
    model = check_moefied(model)
    remaining, config = check_prunable(model, experts)
    sites = model.moe_sites()
    state = model.state_dict()
    for site, left in zip(sites, remaining, strict=True):
        neurons = torch.arange(site.sizes[1]).view(routed(site).num_experts, -1)[left].flatten()
        for name, tensor in smaller_tensors(site, torch.tensor(left), neurons):
            state[name] = tensor
    pruned = type(model)(config)
    pruned.to(dtype=model.dtype)  # type: ignore[call-arg]
    for site in pruned.moe_sites():
        routed(site).router.float()  # as ever
    pruned.config.dtype = model.config.dtype
    pruned.load_state_dict(state)
    if model.can_generate():
        pruned.generation_config = copy.deepcopy(model.generation_config)
    pruned.to(device=model.device)  # type: ignore[call-arg]
    return pruned.train(model.training)


def check_prunable(model: PreTrainedModel, experts: Mapping[int, Iterable[int]]) -> tuple[list[list[int]], Any]:
    """Return the experts that stay in each layer, and the config with narrower FFNs.

    Raises:
        MoefyError: see `prune`.
    """
    model = check_moefied(model)
    remaining, sites = remaining_experts(model, experts), model.moe_sites()
    for position, read in enumerate(inputs_from(sites)):
        if remaining[position] != remaining[read]:
            raise MoefyError(
                f"layers {read} and {position} have one router, which chooses the same of their experts: prune the "
                "same in both"
            )
    for site in sites:
        if site.spec.together is not None:
            together = f"its {site.spec.together} takes all neurons of a token together"
            raise MoefyError(f"{site.name}: {together}, so that none can go")
        router = routed(site).router
        for param in router.parameters():
            if tuple(param.shape) != (router.num_experts, site.sizes[0]):
                kind = type(router).__name__
                raise MoefyError(f"{site.name}: a {kind} mixes experts; prune a model whose router is linear")
    return remaining, smaller_config(model, len(remaining[0]))


def remaining_experts(model: MoefiedModel, experts: Mapping[int, Iterable[int]]) -> list[list[int]]:
    """Return the experts that stay in each layer, in order, when `experts` go.

    Raises:
        MoefyError: see `prune`.
    """
    sites = model.moe_sites()
    sizes = [routed(site).num_experts for site in sites]
    if len(sites) < len(find_sites(model)):
        raise MoefyError("FFNs that are not routed keep their width, and one config gives all the same: convert all")
    if len({site.sizes[1] for site in sites}) > 1:
        raise MoefyError("FFNs of different widths cannot be pruned: convert with the same number of experts in all")
    gone = {layer: set(pruned) for layer, pruned in experts.items()}
    if unknown := sorted(set(gone) - set(range(len(sites)))):
        raise MoefyError(f"there is no routed layer {unknown[0]!r}: choose from 0 to {len(sites) - 1}")
    counts = [len(gone.get(layer, ())) for layer in range(len(sites))]
    if len(set(counts)) > 1:
        raise MoefyError(
            f"layers would lose {', '.join(map(str, counts))} experts: an ordinary config has one width for all, so "
            "prune equally many in each"
        )
    shared = Section(model.config).shared_experts
    for layer, pruned in gone.items():
        last = sizes[layer] - 1
        if wrong := sorted(e for e in pruned if not (isinstance(e, int) and shared <= e <= last)):
            raise MoefyError(f"layer {layer} has no expert {wrong[0]!r} to prune: choose from {shared} to {last}")
    least = max(shared + 1, 1)
    if sizes[0] - counts[0] < least:
        raise MoefyError(f"{counts[0]} of {sizes[0]} experts cannot go: at least {least} must be left")
    return [[e for e in range(size) if e not in gone.get(layer, ())] for layer, size in enumerate(sizes)]


def smaller_config(model: MoefiedModel, experts: int) -> Any:
    """Return the model's config with FFNs of so many experts.

    Raises:
        MoefyError: its selection has a budget that was measured, or the config does not say how wide FFNs are.
    """
    sites = model.moe_sites()
    width, before = experts * routed(sites[0]).expert_size, sites[0].sizes[1]
    config = copy.deepcopy(model.config)
    for part, name in itertools.product(deciding_configs(model, sites, config), WIDTHS):
        if getattr(part, name, None) == before:
            setattr(part, name, width)
    section = Section(config)
    if section.num_experts is not None:
        section.num_experts = experts
    section.forget(MEASURED_OF_EXPERTS)
    if section.selection["type"] != "top_k" and "k" in section.selection:
        raise MoefyError("a budget that was measured with all experts cannot be kept: set the selection's own setting")
    if section.selection["type"] == "top_k":
        ks = [min(int(k), experts) for site in sites if (k := routed(site).k) is not None]
        same = len(set(ks)) == 1
        section.selection = {**section.selection, "k": ks[0] if same else ks, "allocation": "uniform"}
    with torch.device("meta"):
        widths = {site.sizes[1] for site in find_sites(type(model)(copy.deepcopy(config)))}
    if widths != {width}:
        raise MoefyError(
            f"the config of {type(model).__name__} does not decide the width of its FFNs by {', '.join(WIDTHS)}: "
            "it cannot be pruned"
        )
    return config


def smaller_tensors(site: FfnSite, experts: torch.Tensor, neurons: torch.Tensor) -> Iterable[tuple[str, torch.Tensor]]:
    """Yield names in the state dict, and values, of what some neurons and experts of an FFN own.

    Args:
        experts, neurons: (e,), (n,), those that stay.
    """
    act, prefix = routed(site), f"{site.name}." if site.name else ""
    width, shared = site.sizes[1], act.num_experts - act.router.num_experts
    for name, param, dim, blocks in site.neuron_dims():
        index = torch.cat([neurons + block * width for block in range(blocks)])
        yield f"{prefix}{name}", param.detach().index_select(dim, index.to(param.device))
    for name, buffer in act.named_buffers(recurse=False):  # a number per neuron
        yield f"{prefix}{site.spec.act}.{name}", buffer.index_select(0, neurons.to(buffer.device))
    scored = experts[experts >= shared] - shared
    for name, param in act.router.named_parameters():
        yield f"{prefix}{site.spec.act}.router.{name}", param.detach().index_select(0, scored.to(param.device))


def check_count(model: PreTrainedModel, count: int) -> None:
    """Check that so many experts of every layer can be pruned, whichever they are.

    Raises:
        MoefyError: see `prune`.
    """
    model = check_moefied(model)
    sizes = [routed(site).num_experts for site in model.moe_sites()]
    shared = routed(model.moe_sites()[0]).shared
    most = min(sizes) - shared - 1
    if not 1 <= count <= most:
        raise MoefyError(f"{count} experts cannot be pruned: choose 1 to {most} experts of each layer")
    check_prunable(model, {layer: range(shared, shared + count) for layer in range(len(sizes))})


def least_used(loads: Sequence[Sequence[float]], count: int, spared: int = 0) -> dict[int, list[int]]:
    """Return the `count` experts of each layer with the smallest load.

    Args:
        loads: a number for each expert of each layer, as `measure_load` returns them.
        spared: the first so many of each layer stay: shared experts.
    """
    return {
        layer: sorted(sorted(range(spared, len(load)), key=lambda e: load[e])[:count])
        for layer, load in enumerate(loads)
    }


def least_needed(model: PreTrainedModel, ranking: Iterable[Sequence[int]], count: int) -> dict[int, list[int]]:
    """Return the last `count` experts of each layer in a ranking; shared experts are spared.

    Args:
        ranking: (layer, expert) of all experts, the most needed first, as `ablate` returns it.

    Raises:
        MoefyError: the model is not MoEfied, or has other experts than those that are ranked.
    """
    sites = check_moefied(model).moe_sites()
    sizes = [routed(site).num_experts for site in sites]
    places = {(int(layer), int(expert)): -place for place, (layer, expert) in enumerate(ranking)}
    if places.keys() != {(layer, e) for layer, size in enumerate(sizes) for e in range(size)}:
        raise MoefyError(f"the ranking ranks other experts than those {sum(sizes)} that the model has")
    loads = [[float(places[layer, e]) for e in range(size)] for layer, size in enumerate(sizes)]
    return least_used(loads, count, routed(sites[0]).shared)
