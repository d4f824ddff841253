"""The `moefy` command: a thin layer over the Python functions of the same names."""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel

from .configuration import MoeficationConfig
from .conversion import check_convertible, moefied_class, moefy_
from .exporting import TARGETS, export
from .folders import written_whole
from .modeling.ffn_sites import find_sites
from .modeling.moefied import is_moefied
from .modeling.routers import ROUTERS
from .splitting import SPLITTERS

EXAMPLES = """examples:
  moefy inspect google-bert/bert-base-uncased
  moefy convert HuggingFaceTB/SmolLM2-135M smol-moe --texts train.txt --splitter coactivation --k 0.25
  moefy convert my-model my-moe --splitter parameter_clustering --router similarity --allocation uniform
  moefy export smol-moe smol-mixtral --k 0.25
  moefy export smol-moe smol-dense --to dense

MODEL is a Hub id or a local directory. Exit code 2: something about the input, said in one line."""


def main(arguments: list[str] | None = None) -> None:
    args = parser().parse_args(arguments)
    try:
        found = args.run(args)
    except (ValueError, OSError) as error:  # what users can mend; anything else is a bug and shows its traceback
        print(f"moefy {args.command}: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    print(json.dumps(found, indent=1) if args.json else args.show(found))


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="moefy", description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run: Callable, show: Callable, what: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=what, description=what)
        added.add_argument("model", metavar="MODEL", help="Hub id or local directory")
        added.add_argument("--revision", default="main", help="branch, tag or commit on the Hub")
        added.add_argument("--json", action="store_true", help="print JSON")
        added.set_defaults(run=run, show=show)
        return added

    command("inspect", inspect, show_inspected, "What can be MoEfied in a model: its FFNs, and the sizes of experts.")
    convert_ = command("convert", convert, lambda found: found["table"], "Split a dense model's FFNs and fit routers.")
    convert_.add_argument("output_dir", help="directory that gets the MoEfied model; must not exist")
    convert_.add_argument("--texts", help="text file to calibrate on, one text per line")
    convert_.add_argument("--max_length", type=int, default=256, help="tokens of a text (default: 256)")
    convert_.add_argument("--expert_size", type=int, default=32, help="neurons per expert (default: 32)")
    convert_.add_argument("--num_experts", type=int, help="experts per FFN, instead of a size")
    convert_.add_argument("--splitter", default="coactivation", help=f"{', '.join(SPLITTERS)} (default: coactivation)")
    convert_.add_argument("--router", default="linear", help=f"{', '.join(ROUTERS)} (default: linear)")
    convert_.add_argument("--k", type=share_or_count, default=0.2, help="share or number of experts (default: 0.2)")
    convert_.add_argument("--allocation", choices=["sensitivity", "uniform"], help="budget per layer")
    convert_.add_argument("--calibration_tokens", type=int, default=50_000, help="tokens to use (default: 50000)")
    convert_.add_argument("--seed", type=int, default=0)
    export_ = command(
        "export", export_model, lambda found: found["output_dir"], "Write a MoEfied model as a served architecture."
    )
    export_.add_argument("output_dir", help="directory that gets the checkpoint; must not exist, or be empty")
    export_.add_argument("--to", help=f"{', '.join(TARGETS)} or dense; by default what the model's attention fits")
    export_.add_argument("--k", type=share_or_count, help="experts of every layer (default: those the model has)")
    return top


def share_or_count(text: str) -> int | float:
    try:
        return float(text) if "." in text or "e" in text else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"a share like 0.2 or a number of experts, got {text!r}") from None


def class_of(config: Any) -> type[PreTrainedModel]:
    """The model class that a checkpoint names, MoEfied where it is."""
    names = config.architectures or []
    if not names:
        raise ValueError("its config names no architecture, so that there is no telling what head it has")
    stock = getattr(transformers, names[0].removeprefix("Moefied"), None)
    if stock is None:
        raise ValueError(f"{names[0]} is no architecture of transformers {transformers.__version__}")
    return moefied_class(stock) if hasattr(config, "moefication") else stock


def load(args: argparse.Namespace) -> PreTrainedModel:
    config = AutoConfig.from_pretrained(args.model, revision=args.revision)
    return class_of(config).from_pretrained(args.model, revision=args.revision)


def inspect(args: argparse.Namespace) -> dict[str, Any]:
    """Without loading weights."""
    config = AutoConfig.from_pretrained(args.model, revision=args.revision)
    with torch.device("meta"):
        model = class_of(config)(config)
    sites = find_sites(model)
    ffn = sum(param.numel() for site in sites for param in {id(p): p for _, p, _, _ in site.neuron_dims()}.values())
    found: dict[str, Any] = {
        "model_type": config.model_type,
        "architecture": model._get_name(),
        "parameters": model.num_parameters(),
        "ffn_parameters": ffn,
        "moefication": getattr(config, "moefication", None),
        "export": [name for name, target in TARGETS.items() if config.model_type in target.sources] + ["dense"],
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
    return found


def show_inspected(found: dict[str, Any]) -> str:
    share = found["ffn_parameters"] / found["parameters"]
    section = found["moefication"]
    lines = [
        f"{found['architecture']} ({found['model_type']}), {found['parameters'] / 1e6:,.1f} M parameters, "
        f"{share:.0%} of them in {len(found['ffns'])} FFNs",
        f"can be exported to {', '.join(found['export'])}" if section else "dense",
    ]
    if section:
        lines.append(f"MoEfied: {section['splitter']} split, {section['router']} router, {section['selection']}")
    lines += ["", "| FFN | d | neurons | gated | expert sizes |", "|---|---|---|---|---|"]
    for ffn in found["ffns"]:
        sizes = ", ".join(map(str, [n for n in ffn["expert_sizes"] if n <= 256]))
        gated = "yes" if ffn["gated"] else "no"
        lines.append(f"| {ffn['name']} | {ffn['hidden_size']} | {ffn['neurons']} | {gated} | {sizes} |")
    return "\n".join(lines)


def convert(args: argparse.Namespace) -> dict[str, Any]:
    output_dir = Path(args.output_dir)
    if output_dir.exists():
        raise ValueError(f"{output_dir} exists: choose another output_dir")
    selection = {"type": "top_k", "k": args.k} | ({"allocation": args.allocation} if args.allocation else {})
    config = MoeficationConfig(
        num_experts=args.num_experts,
        expert_size=args.expert_size,
        splitter=args.splitter,
        router=args.router,
        selection=selection,
        calibration_tokens=args.calibration_tokens,
        seed=args.seed,
    )
    if args.texts is not None and not Path(args.texts).is_file():
        raise ValueError(f"{args.texts} is no text file")
    model = load(args)
    check_convertible(model, config, args.texts)
    tokenizer = AutoTokenizer.from_pretrained(args.model, revision=args.revision) if args.texts else None
    batches = TextBatches(args.texts, tokenizer, args.max_length, args.seed) if args.texts else None
    report = moefy_(model, config, batches)
    with written_whole(output_dir) as folder:
        model.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
    return {"output_dir": str(output_dir), "table": report.table(), **report.to_dict()}


class TextBatches:
    """Lines of a file as padded, model-ready batches in a seeded order; can be read any number of times."""

    def __init__(self, path: str, tokenizer: Any, max_length: int, seed: int, batch_size: int = 16):
        lines = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
        if not lines:
            raise ValueError(f"{path} holds no text")
        order = torch.randperm(len(lines), generator=torch.Generator().manual_seed(seed)).tolist()
        self.parts = [
            [lines[i] for i in order[start : start + batch_size]] for start in range(0, len(lines), batch_size)
        ]
        self.tokenizer, self.max_length = tokenizer, max_length
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token

    def __len__(self) -> int:
        return len(self.parts)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        for part in self.parts:
            yield dict(
                self.tokenizer(part, truncation=True, max_length=self.max_length, padding=True, return_tensors="pt")
            )


def export_model(args: argparse.Namespace) -> dict[str, Any]:
    model = load(args)
    if args.k is not None and is_moefied(model):
        model.set_selection(k=args.k, allocation="uniform")
    try:
        tokenizer = AutoTokenizer.from_pretrained(args.model, revision=args.revision)
    except (ValueError, OSError):  # a checkpoint without one is exported without one
        tokenizer = None
    return {"output_dir": str(export(model, args.output_dir, args.to, tokenizer=tokenizer))}
