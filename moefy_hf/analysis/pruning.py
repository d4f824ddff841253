"""Prune experts: their neurons are really removed, and what is left is an ordinary, smaller checkpoint."""

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from transformers import PreTrainedModel

from ..loading import check_moefied
from ..measure.router_inputs import inputs_from
from ..modeling.allocation import MEASURED
from ..modeling.ffn_sites import FfnSite, find_sites

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
    """A new model without these experts, `{layer: [expert, ...]}`, as many in every layer.

    What is left computes what the model does while its routers select none of them. Budgets stay counts where they
    fit, so that a token costs what it did.

    Raises:
        ValueError: the model is not MoEfied; not every FFN is routed, or has equally many experts to prune; an expert
            does not exist or is a shared one; the routers mix experts (`mlp`), or one for all layers would lose
            different ones; or the config does not say how wide
            the FFNs are; nothing is made then.
    """
    kept, config = check_prunable(model, experts)
    sites = model.moe_sites()
    state = model.state_dict()
    for site, each in zip(sites, kept, strict=True):
        neurons = torch.arange(site.sizes[1]).view(site.act.num_experts, -1)[each].flatten()
        for name, tensor in smaller_tensors(site, torch.tensor(each), neurons):
            state[name] = tensor
    pruned: PreTrainedModel = type(model)(config)
    pruned.to(dtype=model.dtype)  # type: ignore[call-arg]
    for site in pruned.moe_sites():
        site.act.router.float()  # as ever
    pruned.config.dtype = model.config.dtype
    pruned.load_state_dict(state)
    if model.can_generate():
        pruned.generation_config = copy.deepcopy(model.generation_config)
    pruned.to(device=model.device)  # type: ignore[call-arg]
    return pruned.train(model.training)


def check_prunable(model: PreTrainedModel, experts: Mapping[int, Iterable[int]]) -> tuple[list[list[int]], Any]:
    """The experts that each layer keeps, and the config with narrower FFNs.

    Raises:
        ValueError: see `prune`.
    """
    check_moefied(model)
    kept, sites = kept_experts(model, experts), model.moe_sites()
    for position, read in enumerate(inputs_from(sites)):
        if kept[position] != kept[read]:
            raise ValueError(
                f"layers {read} and {position} have one router, which chooses the same of their experts: prune the "
                "same in both"
            )
    for site in sites:
        for param in site.act.router.parameters():
            if tuple(param.shape) != (site.act.router.num_experts, site.sizes[0]):
                kind = type(site.act.router).__name__
                raise ValueError(f"{site.name}: a {kind} mixes experts; prune a model whose router is linear")
    return kept, smaller_config(model, len(kept[0]))


def kept_experts(model: PreTrainedModel, experts: Mapping[int, Iterable[int]]) -> list[list[int]]:
    """The experts that each layer keeps, in order."""
    sites = model.moe_sites()
    if len(sites) < len(find_sites(model)):
        raise ValueError("FFNs that are not routed keep their width, and one config gives all the same: convert all")
    if len({site.sizes[1] for site in sites}) > 1:
        raise ValueError("FFNs of different widths cannot be pruned: convert with the same number of experts in all")
    gone = {layer: set(each) for layer, each in experts.items()}
    if unknown := sorted(set(gone) - set(range(len(sites)))):
        raise ValueError(f"there is no routed layer {unknown[0]!r}: choose from 0 to {len(sites) - 1}")
    counts = [len(gone.get(layer, ())) for layer in range(len(sites))]
    if len(set(counts)) > 1:
        raise ValueError(
            f"layers would lose {', '.join(map(str, counts))} experts: an ordinary config has one width for all, so "
            "prune equally many in each"
        )
    shared = model.config.moefication.get("shared_experts", 0)
    for layer, each in gone.items():
        last = sites[layer].act.num_experts - 1
        if wrong := sorted(e for e in each if not (isinstance(e, int) and shared <= e <= last)):
            raise ValueError(f"layer {layer} has no expert {wrong[0]!r} to prune: choose from {shared} to {last}")
    least = max(shared + 1, 1)
    if sites[0].act.num_experts - counts[0] < least:
        raise ValueError(f"{counts[0]} of {sites[0].act.num_experts} experts cannot go: at least {least} must be left")
    return [
        [e for e in range(site.act.num_experts) if e not in gone.get(layer, ())] for layer, site in enumerate(sites)
    ]


def smaller_config(model: PreTrainedModel, experts: int) -> Any:
    """The model's config with narrower FFNs."""
    site = model.moe_sites()[0]
    width, before = experts * site.act.expert_size, site.sizes[1]
    config = copy.deepcopy(model.config)
    for name in WIDTHS:
        if getattr(config, name, None) == before:
            setattr(config, name, width)
    section = config.moefication
    if section["num_experts"] is not None:
        section["num_experts"] = experts
    for measured in (*MEASURED, "reach"):  # of the experts that were there
        section.pop(measured, None)
    if section["selection"]["type"] != "top_k" and "k" in section["selection"]:
        raise ValueError("a budget that was measured with all experts cannot be kept: set the selection's own setting")
    if section["selection"]["type"] == "top_k":
        ks = [min(site.act.selection.k + site.act.shared, experts) for site in model.moe_sites()]
        same = len(set(ks)) == 1
        section["selection"] = {**section["selection"], "k": ks[0] if same else ks, "allocation": "uniform"}
    with torch.device("meta"):
        made = {site.sizes[1] for site in find_sites(type(model)(copy.deepcopy(config)))}
    if made != {width}:
        raise ValueError(
            f"the config of model type {config.model_type!r} does not decide the width of its FFNs by "
            f"{', '.join(WIDTHS)}: it cannot be pruned"
        )
    return config


def smaller_tensors(site: FfnSite, experts: torch.Tensor, neurons: torch.Tensor) -> Iterable[tuple[str, torch.Tensor]]:
    """Names in the state dict and values of what neurons and experts own."""
    act, prefix = site.act, f"{site.name}." if site.name else ""
    width, shared = site.sizes[1], act.num_experts - act.router.num_experts
    for name, param, dim, blocks in site.neuron_dims():
        index = torch.cat([neurons + block * width for block in range(blocks)])
        yield f"{prefix}{name}", param.detach().index_select(dim, index.to(param.device))
    for name, buffer in act.named_buffers(recurse=False):  # a number per neuron
        yield f"{prefix}{site.spec.act}.{name}", buffer.index_select(0, neurons.to(buffer.device))
    routed = experts[experts >= shared] - shared
    for name, param in act.router.named_parameters():
        yield f"{prefix}{site.spec.act}.router.{name}", param.detach().index_select(0, routed.to(param.device))


def least_used(loads: list[list[float]], count: int, spared: int = 0) -> dict[int, list[int]]:
    """The `count` experts of each layer with the smallest load; the first `spared` are left alone."""
    return {
        layer: sorted(sorted(range(spared, len(load)), key=lambda e: load[e])[:count])
        for layer, load in enumerate(loads)
    }
