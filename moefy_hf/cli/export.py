"""`moefy export` and `moefy permute-adapter`: MoEfied models and adapters in other shapes."""

import argparse
import contextlib
import json
from argparse import Namespace
from collections import Counter
from dataclasses import asdict, replace
from typing import Any

from transformers import AutoImageProcessor, PreTrainedTokenizerBase

from ..arguments import share_or_count
from ..conversion.adapters import permute_adapter
from ..errors import MoefyError
from ..exporters.export import export, export_gguf
from ..exporters.formats import EXPORT_FORMATS
from ..exporters.onnx_export import FACTS
from ..exporters.onnx_times import times_line
from ..loading import check_moefied
from ..modeling.moefied import is_moefied
from .common import (
    DATA,
    NEW_FOLDER,
    add_data,
    load_as_saved,
    load_tokenizer,
    new_folder,
    of_model,
    open_data,
    show_output,
    text_batches,
)
from .offloading import add_offload, wants_offload


def add_export(command: argparse.ArgumentParser) -> None:
    """Add the arguments of `moefy export`."""
    of_model(command, export_model, show_export)
    command.add_argument("output", metavar="OUTPUT", help=f"{NEW_FOLDER}; a file for gguf")
    targets = f"{', '.join(EXPORT_FORMATS)}, onnx, gguf or dense"
    command.add_argument("--to", help=f"{targets} (default: what the attention fits)")
    command.add_argument("--dense", metavar="GGUF", help="GGUF file of the dense model, for --to gguf")
    command.add_argument("--k", type=share_or_count, help="experts of every layer (default: those the model has)")
    command.add_argument("--int8", action="store_true", help="with --to onnx: 8-bit matrices")
    help = "with --to onnx: do not time the graphs against the dense model's, which takes as long as writing them"
    command.add_argument("--no_timing", action="store_true", help=help)
    help = f"with --to onnx: texts on which it is compared with MODEL (default: random inputs); {DATA}"
    add_data(command, required=False, help=help, leave_out=("label_column", "target_column"))
    add_offload(command)


def add_adapter(command: argparse.ArgumentParser) -> None:
    """Add the arguments of `moefy permute-adapter`."""
    of_model(command, permuted_adapter, show_output)
    command.add_argument("adapter", metavar="ADAPTER", help="Hub id or folder, trained on the dense model: LoRA, IA3")
    command.add_argument("output", metavar="OUTPUT", help="folder that gets the one that fits MODEL; must not exist")


def export_model(args: Namespace) -> dict[str, Any]:
    """Write MODEL in another shape; return the folder or file, and what is known of an ONNX graph or a GGUF file."""
    output = new_folder(args.output)
    if args.to != "onnx" and (args.int8 or args.data or args.no_timing):
        raise MoefyError("--int8, --data and --no_timing belong to --to onnx")
    table = open_data(args) if args.data else None
    model = load_as_saved(args, wants_offload(args))
    if args.k is not None and is_moefied(model):
        check_moefied(model).set_selection(k=args.k, allocation="uniform")
    if args.to == "gguf":
        return asdict(export_gguf(model, output, args.dense)) | {"output": str(output)}
    tokenizer = tokenizer_or_none(args)
    if args.to != "onnx":
        return {"output": str(export(model, output, args.to, tokenizer=tokenizer, dense=args.dense))}
    if table and tokenizer is None:
        raise MoefyError(f"{args.model} has no tokenizer, which --data needs")
    texts = replace(table.read(model), targets=None) if table else None  # graphs are given what a decoder reads
    batches = text_batches(args, model, tokenizer, texts) if texts and tokenizer else None
    options = {"int8": args.int8, "batches": batches, "timing": not args.no_timing}
    export(model, output, "onnx", tokenizer=tokenizer or image_processor(args), **options)
    return {"output": str(output)} | json.loads((output / FACTS).read_text(encoding="utf-8"))


def show_export(result: dict[str, Any]) -> str:
    """Return what `moefy export` prints: where it is, how close an ONNX graph comes, how llama.cpp gets a budget."""
    if "budget" in result:
        lines = [f"{result['output']} ({result['architecture']})"]
        if kind := result["requantised"]:
            lines.append(f"down projections were quantised anew to {kind}; all other numbers are the same")
        lines.append(f"set how many experts run (twice, at most {result['most_experts']}): {result['budget']}")
        return "\n".join(lines)
    if "largest_difference" not in result:
        return show_output(result)
    operators = Counter(result["operators"].values())
    ffns = ", ".join(f"{count} FFNs as {name}" for name, count in operators.items()) or "no routed FFNs"
    by_kind = ", ".join(f"{kind} {each:.1e}" for kind, each in result["differences"].items())
    line = f"{result['output']}: {ffns}; largest difference, of the largest output: {by_kind}"
    return f"{line}\n{times_line(result['times_dense'])}" if "times_dense" in result else line


def tokenizer_or_none(args: Namespace) -> PreTrainedTokenizerBase | None:
    """Load MODEL's tokenizer; a checkpoint without one is exported without one."""
    try:
        return load_tokenizer(args)
    except (ValueError, OSError):
        return None


def image_processor(args: Namespace) -> Any:
    """Load MODEL's image processor; None where it has none."""
    with contextlib.suppress(ValueError, OSError, ImportError, KeyError):
        trusted = {"revision": args.revision, "trust_remote_code": args.trust_remote_code}
        return AutoImageProcessor.from_pretrained(args.model, **trusted)
    return None


def permuted_adapter(args: Namespace) -> dict[str, Any]:
    """Write the adapter that fits MODEL; return the folder."""
    output = new_folder(args.output)
    return {"output": str(permute_adapter(args.adapter, load_as_saved(args), output))}
