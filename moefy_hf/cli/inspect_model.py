"""`moefy inspect`: what can be MoEfied in a model, without loading its weights."""

import argparse
import difflib
from argparse import Namespace
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedModel

from ..discovery.probe import function_of
from ..discovery.search import LeftAlone, search
from ..discovery.towers import tower_of
from ..errors import MoefyError
from ..exporters.export import targets_of
from ..hub.card_text import router_settings_of
from ..io import markdown
from ..loading import check_moefied, checkpoint_class, heads_of, read_config
from ..modeling.ffn_sites import FfnSite, starred
from ..modeling.moefied import is_moefied
from ..modeling.section import Section
from .common import of_model

HELP = """FFNs are found by their structure, and by running a copy of one of each kind on random numbers: no table of
architectures is needed, and no weights are read. The table has a line for all FFNs that are alike, * for their layers.

  gated             whether a second projection multiplies the activation (SwiGLU, GEGLU)
  parts             what its Linears are called; of a fused one, which half comes first
  inner dropout     what drops neurons in training
  together          what takes all neurons of a token together (a norm): experts are then computed masked only

Below it stands what looks like an FFN and is left alone, with the reason.

examples:
  moefy inspect google-bert/bert-base-uncased
  moefy inspect openai/clip-vit-base-patch32 --json
  moefy inspect --model_type gemma3"""


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add the arguments of `moefy inspect`."""
    of_model(command, inspect_model, show_inspected, optional=True)
    command.add_argument("--model_type", help="instead of MODEL: an architecture of transformers, in its default size")
    command.epilog, command.formatter_class = HELP, argparse.RawDescriptionHelpFormatter


def inspect_model(args: Namespace) -> dict[str, Any]:
    """Return what MODEL is, how it is MoEfied, and what its FFNs are.

    Raises:
        MoefyError: not one of MODEL and --model_type is given, or there is no such architecture.
    """
    if (args.model is None) == (args.model_type is None):
        raise MoefyError("give a MODEL, or an architecture by --model_type")
    trusted: dict[str, Any] = {"trust_remote_code": args.trust_remote_code, "revision": args.revision}
    config = read_config(args.model, **trusted) if args.model else default_config(args.model_type)
    head = args.head or (None if args.model else next(iter(heads_of(config)), None))
    cls = checkpoint_class(config, head, **trusted)
    with torch.device("meta"):
        model = cls(config)
        dense = check_moefied(model).stock_class()(config) if is_moefied(model) else model
    found, section = search(dense), Section.of(config)
    routed = {site.key for site in check_moefied(model).moe_sites()} if is_moefied(model) else set()
    owned = {id(param): param.numel() for site in found.sites for _, param, _, _ in site.neuron_dims()}
    return {
        "model_type": config.model_type,
        "architecture": model._get_name(),
        "parameters": model.num_parameters(),
        "ffn_parameters": sum(owned.values()),
        "moefication": section and section.values,
        "export": targets_of(dense),
        "ffns": [ffn_facts(dense, site) | {"routed": site.key in routed} for site in found.sites],
        "left": grouped(found.left),
    }


def default_config(model_type: str) -> Any:
    """Return the default config of an architecture.

    Raises:
        MoefyError: transformers has none of this name.
    """
    if model_type not in CONFIG_MAPPING:
        near = difflib.get_close_matches(model_type, CONFIG_MAPPING.keys())
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise MoefyError(f"transformers has no model type {model_type!r}{hint}")
    return AutoConfig.for_model(model_type)


def ffn_facts(model: PreTrainedModel, site: FfnSite) -> dict[str, Any]:
    """Return what is known of one FFN."""
    spec, (d, f) = site.spec, site.sizes
    return {
        "name": site.name,
        "tower": tower_of(model, site.name),
        "hidden_size": d,
        "neurons": f,
        "gated": spec.gate is not None or spec.parts == 2,
        "activation": spec.function or function_of(site.act) or type(site.act).__name__,
        **{part: vars(spec)[part] for part in ("up", "down", "gate")},
        "fused": None if spec.parts == 1 else "up first" if spec.up_first else "gate first",
        "inner_dropout": spec.dropout,
        "norm": spec.norm,
        "before": spec.before,
        "expert_sizes": [n for n in range(8, f // 2 + 1) if f % n == 0],
    }


def grouped(left: Iterable[LeftAlone]) -> list[dict[str, str]]:
    """Return what was left alone, modules that are alike as one: {"modules": "layers.0-3.mlp", "reason": "..."}."""
    groups: dict[tuple[str, str], list[list[int]]] = {}
    for each in left:
        numbers = [int(part) for part in each.name.split(".") if part.isdigit()]
        groups.setdefault((starred(each.name), each.reason), []).append(numbers)
    result = []
    for (place, reason), members in groups.items():
        for column in zip(*members, strict=True):
            place = place.replace("*", ranged(sorted({*column})), 1)
        result.append({"modules": place, "reason": reason})
    return result


def ranged(numbers: Sequence[int]) -> str:
    """Return ascending numbers in words: "0-3" or "0,2,5"."""
    first, last = numbers[0], numbers[-1]
    consecutive = last - first + 1 == len(numbers) > 1
    return f"{first}-{last}" if consecutive else ",".join(map(str, numbers))


def show_inspected(result: dict[str, Any]) -> str:
    """Return what `moefy inspect` prints of its result."""
    share, ffns = result["ffn_parameters"] / result["parameters"], result["ffns"]
    lines = [
        f"{result['architecture']} ({result['model_type']}), {result['parameters'] / 1e6:,.1f} M parameters, "
        f"{share:.0%} of them in {len(ffns)} FFNs",
        f"can be exported to {', '.join(result['export'])}" if result["moefication"] else "dense",
    ]
    if result["moefication"]:
        section = Section.of_values(result["moefication"])
        router = f"{section.router} router{router_settings_of(section)}"
        count = sum(ffn["routed"] for ffn in ffns)
        lines.append(f"MoEfied: {count} FFNs, {section.splitter} split, {router}, {section.selection}")
    towers = list(dict.fromkeys(ffn["tower"] for ffn in ffns if ffn["tower"] is not None))
    if "text" in towers and len(towers) > 1:
        lines.append(f"towers: {', '.join(towers)}; moefy convert splits text, and others by --towers")
    if ffns:
        lines += ["", markdown(table(ffns))]
    if result["left"]:
        lines += ["", "left alone:"]
        lines += [f"- {each['modules']}: {each['reason']}" for each in result["left"]]
    return "\n".join(lines)


def table(ffns: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows of the printed table, one for all FFNs that are alike."""
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for ffn in ffns:
        alike = {key: value for key, value in ffn.items() if key not in ("name", "expert_sizes", "routed")}
        groups.setdefault((starred(ffn["name"]), *alike.values()), []).append(ffn)
    rows = []
    for (place, *_), alike_ffns in groups.items():
        ffn = alike_ffns[0]
        parts = [f"{part} {ffn[part]}" for part in ("gate", "up", "down") if ffn[part] is not None]
        rows.append(
            {
                "tower": ffn["tower"] or "",
                "FFN": place or "the model",
                "number": len(alike_ffns),
                "d": ffn["hidden_size"],
                "f": ffn["neurons"],
                "gated": "yes" if ffn["gated"] else "no",
                "activation": ffn["activation"],
                "parts": ", ".join(parts) + (f" ({ffn['fused']})" if ffn["fused"] else ""),
                "inner dropout": ffn["inner_dropout"] or "",
                "together": ffn["norm"] or ffn["before"] or "",
                "expert sizes": ", ".join(map(str, [n for n in ffn["expert_sizes"] if n <= 256])),
            }
        )
    return rows
