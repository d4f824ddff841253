"""`moefy inspect`: what can be MoEfied in a model, without loading its weights."""

import argparse
from argparse import Namespace
from typing import Any

import torch

from ..exporters.formats import EXPORT_FORMATS
from ..hub.card_text import router_settings_of
from ..loading import checkpoint_class, read_config
from ..modeling.ffn_sites import find_sites
from ..modeling.section import Section
from .common import of_model


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add the arguments of `moefy inspect`."""
    of_model(command, inspect_model, show_inspected)


def inspect_model(args: Namespace) -> dict[str, Any]:
    """Return what MODEL is, how it is MoEfied, and the sizes of its FFNs."""
    trusted: dict[str, Any] = {"trust_remote_code": args.trust_remote_code, "revision": args.revision}
    config = read_config(args.model, **trusted)
    with torch.device("meta"):
        model = checkpoint_class(config, args.head, **trusted)(config)
    sites, section = find_sites(model), Section.of(config)
    ffn = sum(param.numel() for site in sites for param in {id(p): p for _, p, _, _ in site.neuron_dims()}.values())
    return {
        "model_type": config.model_type,
        "architecture": model._get_name(),
        "parameters": model.num_parameters(),
        "ffn_parameters": ffn,
        "moefication": section and section.values,
        "export": [name for name, format_ in EXPORT_FORMATS.items() if config.model_type in format_.sources]
        + ["dense"],
        "ffns": [
            {
                "name": site.name,
                "hidden_size": site.sizes[0],
                "neurons": site.sizes[1],
                "gated": site.gate is not None or site.spec.parts == 2,
                "expert_sizes": [n for n in range(8, site.sizes[1] // 2 + 1) if site.sizes[1] % n == 0],
            }
            for site in sites
        ],
    }


def show_inspected(result: dict[str, Any]) -> str:
    """Return what `moefy inspect` prints of its result."""
    share = result["ffn_parameters"] / result["parameters"]
    lines = [
        f"{result['architecture']} ({result['model_type']}), {result['parameters'] / 1e6:,.1f} M parameters, "
        f"{share:.0%} of them in {len(result['ffns'])} FFNs",
        f"can be exported to {', '.join(result['export'])}" if result["moefication"] else "dense",
    ]
    if result["moefication"]:
        section = Section.of_values(result["moefication"])
        router = f"{section.router} router{router_settings_of(section)}"
        lines.append(f"MoEfied: {section.splitter} split, {router}, {section.selection}")
    lines += ["", "| FFN | d | neurons | gated | expert sizes |", "|---|---|---|---|---|"]
    for ffn in result["ffns"]:
        sizes = ", ".join(map(str, [n for n in ffn["expert_sizes"] if n <= 256]))
        gated = "yes" if ffn["gated"] else "no"
        lines.append(f"| {ffn['name']} | {ffn['hidden_size']} | {ffn['neurons']} | {gated} | {sizes} |")
    return "\n".join(lines)
