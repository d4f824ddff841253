"""`moefy export` and `moefy permute-adapter`: MoEfied models and adapters in other shapes."""

import argparse
from argparse import Namespace
from dataclasses import asdict
from typing import Any

from ..arguments import share_or_count
from ..conversion.adapters import permute_adapter
from ..exporters.export import export, export_gguf
from ..exporters.formats import EXPORT_FORMATS
from ..loading import check_moefied, load
from ..modeling.moefied import is_moefied
from .common import NEW_FOLDER, load_tokenizer, new_folder, of_model, show_output


def add_export(command: argparse.ArgumentParser) -> None:
    """Add the arguments of `moefy export`."""
    of_model(command, export_model, show_export)
    command.add_argument("output", metavar="OUTPUT", help=f"{NEW_FOLDER}; a file for gguf")
    command.add_argument("--to", help=f"{', '.join(EXPORT_FORMATS)}, gguf or dense (default: what the attention fits)")
    command.add_argument("--dense", metavar="GGUF", help="GGUF file of the dense model, for --to gguf")
    command.add_argument("--k", type=share_or_count, help="experts of every layer (default: those the model has)")


def add_adapter(command: argparse.ArgumentParser) -> None:
    """Add the arguments of `moefy permute-adapter`."""
    of_model(command, permuted_adapter, show_output)
    command.add_argument("adapter", metavar="ADAPTER", help="Hub id or folder, trained on the dense model: LoRA, IA3")
    command.add_argument("output", metavar="OUTPUT", help="folder that gets the one that fits MODEL; must not exist")


def export_model(args: Namespace) -> dict[str, Any]:
    """Write MODEL as a served architecture; return the folder, and of a GGUF file what is to be known of it."""
    output = new_folder(args.output)
    # on the CPU, where it is written from
    trust = args.trust_remote_code
    model = load(args.model, args.revision, head=args.head, dtype=args.dtype, trust_remote_code=trust)
    if args.k is not None and is_moefied(model):
        check_moefied(model).set_selection(k=args.k, allocation="uniform")
    if args.to == "gguf":
        report = asdict(export_gguf(model, output, args.dense))
        return report | {"output": str(output)}
    try:
        tokenizer = load_tokenizer(args)
    except (ValueError, OSError):  # a checkpoint without one is exported without one
        tokenizer = None
    return {"output": str(export(model, output, args.to, tokenizer=tokenizer, dense=args.dense))}


def show_export(result: dict[str, Any]) -> str:
    """Return what is printed: the folder or file, and how llama.cpp is told how many experts to compute."""
    if "budget" not in result:
        return show_output(result)
    lines = [f"{result['output']} ({result['architecture']})"]
    if result["requantised"]:
        lines.append(
            f"down projections were quantised anew to {result['requantised']}; all other numbers are the same"
        )
    lines.append(f"set how many experts run (twice, at most {result['most_experts']}): {result['budget']}")
    return "\n".join(lines)


def permuted_adapter(args: Namespace) -> dict[str, Any]:
    """Write the adapter that fits MODEL; return the folder."""
    output = new_folder(args.output)
    trust = args.trust_remote_code
    model = load(args.model, args.revision, head=args.head, dtype=args.dtype, trust_remote_code=trust)
    return {"output": str(permute_adapter(args.adapter, model, output))}
