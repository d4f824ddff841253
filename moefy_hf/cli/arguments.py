"""The settings of each command of `moefy`."""

import argparse
from collections.abc import Callable
from typing import Any

from ..bench import PRESETS
from ..bench.command import run_bench
from ..bench.ffns import TOKENS
from ..bench.settings import BENCH_ROUTERS, EXPERT_SIZE, NAMES, ROUTER, SHARE
from ..bench.settings import DTYPES as BENCH_DTYPES
from ..evaluation.controls import BASELINES, CONTROLS
from ..exporters.formats import EXPORT_FORMATS
from ..modeling.allocation import ALLOCATIONS
from ..modeling.routers import ROUTERS
from ..modeling.selection import SELECTIONS
from ..runtime.status import kernels_build, kernels_info, show_build, show_info
from ..splitters import SPLITTERS
from .analysis import ablate_model, add_ablate, add_analyze, add_prune, analyze_model, prune_model
from .argument_types import positive, setting, share_or_count
from .commands import card, convert, export_model, inspect, permuted_adapter, profile_model, push, show_inspected
from .sweep import sweep

BUDGETS = "how layers share the budget k (default: by sensitivity, where there are texts and a head)"
DTYPES = ("auto", "float32", "bfloat16", "float16")


def of_model(command: argparse.ArgumentParser, run: Callable, show: Callable) -> argparse.ArgumentParser:
    """What every command on a model takes."""
    command.add_argument("model", metavar="MODEL", help="Hub id or local directory")
    command.add_argument("--revision", default="main", help="branch, tag or commit on the Hub")
    command.add_argument("--dtype", default="auto", choices=DTYPES, help="load in this type (default: as saved)")
    head = "AutoModelForMaskedLM or another Auto class, where its config does not say which head it has"
    command.add_argument("--head", metavar="AUTO", help=head)
    command.add_argument("--json", action="store_true", help="print JSON")
    command.set_defaults(run=run, show=show)
    return command


def add_inspect(inspect_: argparse.ArgumentParser) -> None:
    of_model(inspect_, inspect, show_inspected)


def add_profile(profile_: argparse.ArgumentParser) -> None:
    of_model(profile_, profile_model, table)
    add_texts(profile_, required=True, tokens=50_000)
    profile_.add_argument(
        "--ppl",
        type=float,
        metavar="PERCENT",
        help="also find how many neurons are needed for perplexity to grow by so much; some ten passes",
    )


def add_convert(convert_: argparse.ArgumentParser) -> None:
    of_model(convert_, convert, table)
    convert_.add_argument("output_dir", help="directory that gets the MoEfied model; must not exist")
    add_texts(convert_, required=False, tokens=50_000)
    add_conversion(convert_)
    convert_.add_argument("--force", action="store_true", help="write the model even if it is of no use as it is")


def add_export(export_: argparse.ArgumentParser) -> None:
    of_model(export_, export_model, lambda found: found["output_dir"])
    export_.add_argument("output_dir", help="directory that gets the checkpoint; must not exist, or be empty")
    export_.add_argument("--to", help=f"{', '.join(EXPORT_FORMATS)} or dense (default: what the attention fits)")
    export_.add_argument("--k", type=share_or_count, help="experts of every layer (default: those the model has)")


def add_adapter(adapter_: argparse.ArgumentParser) -> None:
    of_model(adapter_, permuted_adapter, lambda found: found["output_dir"])
    adapter_.add_argument("adapter", metavar="ADAPTER", help="Hub id or folder, trained on the dense model: LoRA, IA3")
    adapter_.add_argument("output_dir", help="directory that gets the adapter that fits MODEL; must not exist")


def add_card(card_: argparse.ArgumentParser) -> None:
    of_model(card_, card, lambda found: found["card"])
    card_.add_argument("--repo_id", help="where it is going to be on the Hub")
    card_.add_argument("--base_model", help="Hub id of the dense model, where the conversion did not see it")
    card_.add_argument("--license", help="of the base model, where the Hub does not know it")
    card_.add_argument("--overwrite", action="store_true", help="replace the README.md that is there")


def add_push(push_: argparse.ArgumentParser) -> None:
    of_model(push_, push, lambda found: found["url"])
    push_.add_argument("repo_id", help="owner/name; created where it does not exist")
    push_.add_argument("--private", action="store_true", default=None, help="if the repository is new")
    push_.add_argument("--branch", help="push there instead of main; created where it does not exist")
    push_.add_argument("--create_pr", action="store_true", help="open a pull request")
    push_.add_argument("--overwrite", action="store_true", help="also over something that is not MoEfied")
    push_.add_argument("--message", default="MoEfied checkpoint", help="of the commit")


def add_conversion(convert_: argparse.ArgumentParser) -> None:
    convert_.add_argument("--expert_size", type=int, default=32, help="neurons per expert (default: 32)")
    convert_.add_argument("--num_experts", type=int, help="experts per FFN, instead of a size")
    convert_.add_argument("--splitter", default="coactivation", help=f"{', '.join(SPLITTERS)} (default: coactivation)")
    convert_.add_argument("--router", default="linear", help=f"{', '.join(ROUTERS)} (default: linear)")
    convert_.add_argument(
        "--router_settings",
        type=setting,
        nargs="+",
        default=[],
        metavar="NAME=NUMBER",
        help="of the router: rank of low_rank, hidden of norm_regression, inputs of partial_input",
    )
    convert_.add_argument("--k", type=share_or_count, default=0.2, help="share or number of experts (default: 0.2)")
    convert_.add_argument("--allocation", choices=ALLOCATIONS, help=BUDGETS)
    convert_.add_argument("--selection", default="top_k", choices=list(SELECTIONS), help="(default: top_k)")
    convert_.add_argument(
        "--shared_experts", type=int, default=0, help="experts that run for every token; k counts them"
    )
    convert_.add_argument(
        "--compensation", action="store_true", help="experts that do not run contribute their conditional means"
    )


def add_sweep(sweep_: argparse.ArgumentParser) -> None:
    of_model(sweep_, sweep, table)
    add_texts(sweep_, required=False)
    sweep_.add_argument("--csv", help="csv file with columns text and label, instead of texts: accuracy")
    budgets = sweep_.add_mutually_exclusive_group()
    budgets.add_argument(
        "--shares",
        type=share_or_count,
        nargs="+",
        default=[0.1, 0.2, 0.3, 0.5],
        help="of the experts, or their number",
    )
    budgets.add_argument("--flops", type=float, nargs="+", help="shares of the dense FFNs' FLOPs, routers included")
    budgets.add_argument(
        "--quality",
        type=float,
        help="find the fewest experts that keep so much of the dense model's: accuracy of at least 0.98 of it, say, "
        "or perplexity of at most 1.05 of it",
    )
    sweep_.add_argument(
        "--selections",
        nargs="+",
        choices=list(SELECTIONS),
        help="types to compare (default: the model's; one that has a "
        "setting instead of a budget is measured as it is)",
    )
    known = ", ".join((*CONTROLS, *BASELINES))
    sweep_.add_argument("--controls", nargs="*", default=["oracle", "random"], help=f"of {known}")
    sweep_.add_argument(
        "--calibration_texts",
        help=f"text file, one text per line, for the thresholds of {', '.join(BASELINES)}, and for what selections "
        "other than top_k spend, where the model does not know",
    )
    sweep_.add_argument("--output", help="JSON file that gets the figures")
    sweep_.add_argument("--plot", help="picture of quality against FLOPs (needs matplotlib)")


def add_bench(bench_: argparse.ArgumentParser) -> None:
    bench_.add_argument("checkpoint", nargs="?", metavar="MODEL", help="MoEfied checkpoint, instead of a preset")
    bench_.add_argument("--preset", help=f"random weights in the shape of {', '.join(PRESETS)} (default: t5-base)")
    bench_.add_argument("--dtype", default="float32", help=f"{' or '.join(BENCH_DTYPES)} (default: float32)")
    bench_.add_argument("--threads", type=int, default=1, help="(default: 1)")
    bench_.add_argument("--share", type=float, help=f"of the experts computed (default: {SHARE}; the checkpoint's)")
    size = ("--expert-size", "--expert_size")
    bench_.add_argument(*size, type=int, help=f"neurons per expert (default: {EXPERT_SIZE}; the checkpoint's)")
    of = f"a preset's, of {', '.join(BENCH_ROUTERS)} (default: {ROUTER})"
    bench_.add_argument("--router", help=of)
    of = f"of {', '.join(NAMES)} (default: all); of whole models auto, too"
    bench_.add_argument("--implementations", nargs="+", default=NAMES, help=of)
    bench_.add_argument("--tokens", type=int, nargs="+", help=f"per call (default: {' '.join(map(str, TOKENS))})")
    bench_.add_argument("--weights", choices=["cold", "warm"], help="from memory, or as the cache has them")
    bench_.add_argument("--nonzero", type=float, metavar="SHARE", help="at most so many neurons of ReLU are not zero")
    whole = bench_.add_mutually_exclusive_group()
    lengths: dict[str, Any] = {"type": int, "nargs": 2}
    whole.add_argument("--generate", **lengths, metavar=("PROMPT", "NEW"), help="whole model, one text, greedy")
    whole.add_argument("--batches", **lengths, metavar=("BATCH", "LENGTH"), help="whole model (encoder), forward")
    bench_.add_argument("--rounds", type=int, default=40, help="timings of each method, at most (default: 40)")
    bench_.add_argument("--seconds", type=float, help="then no more than 5 rounds (default: 20 a size, 300 a model)")
    for kind, what in (("json", "figures"), ("csv", "figures"), ("plot", "speed-up against tokens (matplotlib)")):
        bench_.add_argument(f"--{kind}", metavar="FILE", dest=f"{kind}_file", help=f"file that gets the {what}")
    bench_.set_defaults(run=run_bench, show=table, json=False)


def add_kernels(kernels_: argparse.ArgumentParser) -> None:
    words = kernels_.add_subparsers(dest="word", required=True, metavar="info|build")
    info = words.add_parser("info", help="which implementations can run here, and where the compiled kernel is")
    info.set_defaults(run=lambda args: kernels_info(), show=show_info)
    build = words.add_parser("build", help="compile the C++ kernel now instead of on first use")
    build.add_argument("--force", action="store_true", help="although it is compiled")
    build.set_defaults(run=lambda args: kernels_build(args.force), show=show_build)
    for word in (info, build):
        word.add_argument("--json", action="store_true", help="print JSON")


def add_texts(command: argparse.ArgumentParser, required: bool, tokens: int | None = None) -> None:
    command.add_argument("--texts", required=required, help="text file, one text per line")
    command.add_argument("--max_length", type=positive, default=256, help="tokens of a text (default: 256)")
    command.add_argument("--seed", type=int, default=0)
    if tokens is not None:
        command.add_argument(
            "--calibration_tokens", type=positive, default=tokens, help=f"at most (default: {tokens})"
        )


def table(found: dict) -> str:
    return found["table"]


ADDED: dict[str, Callable[[argparse.ArgumentParser], None]] = {
    "inspect": add_inspect,
    "profile": add_profile,
    "convert": add_convert,
    "sweep": add_sweep,
    "card": add_card,
    "push": add_push,
    "export": add_export,
    "permute-adapter": add_adapter,
    "analyze": lambda command: add_analyze(of_model(command, analyze_model, table)),
    "ablate": lambda command: add_ablate(of_model(command, ablate_model, table)),
    "prune": lambda command: add_prune(of_model(command, prune_model, table)),
    "bench": add_bench,
    "kernels": add_kernels,
}
