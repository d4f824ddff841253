"""`moefy bench`: the time of dense FFNs or models against that of the selected experts alone."""

import argparse
from typing import Any

from ..arguments import positive
from ..bench import PRESETS
from ..bench.command import run_bench
from ..bench.engines import ENGINES
from ..bench.ffns import TOKENS
from ..bench.settings import BENCH_ROUTERS, DTYPES, EXPERT_SIZE, NAMES, ROUTER, SHARE
from .common import DATA, add_data, show_table


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add the arguments of `moefy bench`."""
    command.add_argument("model", nargs="?", metavar="MODEL", help="MoEfied checkpoint, instead of a preset")
    command.add_argument("--preset", help=f"random weights in the shape of {', '.join(PRESETS)} (default: t5-base)")
    command.add_argument("--dtype", help=f"{' or '.join(DTYPES)} (default: float32)")
    command.add_argument("--threads", type=int, default=1, help="(default: 1)")
    command.add_argument("--k", type=float, help=f"share of the experts computed (default: {SHARE}; the checkpoint's)")
    size = f"neurons per expert (default: {EXPERT_SIZE}; the checkpoint's)"
    command.add_argument("--expert_size", type=int, help=size)
    routers = f"a preset's, of {', '.join(BENCH_ROUTERS)} (default: {ROUTER})"
    command.add_argument("--router", help=routers)
    names = f"of {', '.join(NAMES)} (default: all); of whole models auto, too"
    command.add_argument("--implementations", nargs="+", help=names)
    command.add_argument("--tokens", type=int, nargs="+", help=f"per call (default: {' '.join(map(str, TOKENS))})")
    command.add_argument("--weights", choices=["cold", "warm"], help="from memory, or as the cache has them")
    command.add_argument("--nonzero", type=float, metavar="SHARE", help="at most so many neurons of ReLU are not zero")
    whole = command.add_mutually_exclusive_group()
    lengths: dict[str, Any] = {"type": int, "nargs": 2}
    generated = "whole model, one text, greedy; of --against language models (64 32) and encoder-decoders (256 32)"
    whole.add_argument("--generate", **lengths, metavar=("PROMPT", "NEW"), help=generated)
    whole.add_argument("--batches", **lengths, metavar=("BATCH", "LENGTH"), help="whole model (encoder), forward")
    add_against(command)
    command.add_argument("--rounds", type=int, default=40, help="timings of each method, at most (default: 40)")
    command.add_argument("--seconds", type=float, help="then no more than 5 rounds (default: 20 a size, 300 a model)")
    figures = "files that get the figures: .json, .csv"
    command.add_argument("--output", metavar="FILE", nargs="+", action="extend", default=[], help=figures)
    command.add_argument("--plot", metavar="FILE", help="picture of the speed-up against tokens (needs matplotlib)")
    command.add_argument("--json", action="store_true", help="print JSON")
    command.set_defaults(run=run_bench, show=show_table)


def add_against(command: argparse.ArgumentParser) -> None:
    """Add the arguments that compare engines."""
    engines = f"beside other engines, whole and in float32, on --data: {', '.join(ENGINES)}"
    command.add_argument("--against", nargs="+", choices=list(ENGINES), metavar="ENGINE", help=engines)
    images = "for a model of images a folder of them, or a table or dataset with a column of them"
    add_data(command, required=False, help=f"of --against: {DATA}; {images}", seed=False, max_length=None)
    command.add_argument("--dense", metavar="GGUF", help="of --against: GGUF file of the dense model, for llama.cpp")
    sizes = "of --against: texts or images at once; not of language models (default: 1 8 32)"
    command.add_argument("--batch_sizes", type=positive, nargs="+", help=sizes)
