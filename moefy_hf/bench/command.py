"""The command `moefy bench`: it takes parsed arguments and returns figures, with their table."""

import json
from argparse import Namespace
from dataclasses import fields
from pathlib import Path
from typing import Any

from ..arguments import given
from ..data import TextSource
from ..errors import MoefyError
from ..evaluation.plots import plot_bench
from ..io import check_files, write_whole
from .ffns import TOKENS, bench_ffns
from .models import bench_model
from .report import save_csv, table
from .settings import NAMES, Settings
from .side_by_side import SideBySide, bench_against
from .tasks import Reading

FIGURES = (".json", ".csv")
AGAINST = ("data", "dense", "batch_sizes", "max_length", *(field.name for field in fields(TextSource)))  # alone
NOT_AGAINST = (
    *("preset", "dtype", "expert_size", "router", "implementations"),
    *("batches", "tokens", "weights", "nonzero", "plot"),
)


def run_bench(args: Namespace) -> dict[str, Any]:
    """Time a checkpoint beside other engines with `--against`, whole models with `--generate` or `--batches`, else
    FFNs.

    Raises:
        MoefyError: arguments that do not go together, or as `Settings` and `SideBySide`.
    """
    check_files(*args.output, plot=args.plot)
    for path in args.output:
        if Path(path).suffix not in FIGURES:
            raise MoefyError(f"--output writes {' or '.join(FIGURES)}, got {path}")
    check_together(args)
    figures = side_by_side(args) if args.against else alone(args)
    for path in args.output:
        if path.endswith(".csv"):
            save_csv(figures, path)
        else:
            write_whole(Path(path), json.dumps(figures, indent=1))
    if args.plot:
        plot_bench(figures, args.plot)
    return figures | {"table": table(figures)}


def check_together(args: Namespace) -> None:
    """Check which arguments were given.

    Raises:
        MoefyError: some of them do not go together, or one lacks another.
    """
    said = {name for name, value in vars(args).items() if value is not None}
    if args.against:
        wrong = [name for name in NOT_AGAINST if name in said]
        if args.model is None or args.data is None:
            raise MoefyError("--against compares a MoEfied MODEL on texts or images: give MODEL and --data")
    else:
        wrong = [name for name in AGAINST if name in said]
    if wrong:
        how = "do not go with" if args.against else "belong to"
        raise MoefyError(f"{', '.join(f'--{name}' for name in wrong)} {how} --against")


def side_by_side(args: Namespace) -> dict[str, Any]:
    """Time MODEL in PyTorch and in the engines of --against, on --data."""
    numbers = {name: vars(args)[name] for name in ("max_length", "rounds", "seconds")}
    if args.generate:
        numbers |= {"prompt": args.generate[0], "new_tokens": args.generate[1]}
    if args.batch_sizes:
        numbers["batch_sizes"] = tuple(args.batch_sizes)
    source = TextSource(args.data, **given(args, TextSource))
    reading = Reading(source, **{name: value for name, value in numbers.items() if value is not None})
    engines = tuple(dict.fromkeys(args.against))
    return bench_against(SideBySide(args.model, engines, reading, args.dense, args.k, args.threads))


def alone(args: Namespace) -> dict[str, Any]:
    """Time whole models with `--generate` or `--batches`, else FFNs.

    Raises:
        MoefyError: arguments that do not go together, or as `Settings`.
    """
    whole = args.generate or args.batches
    ffns_only = {"tokens": args.tokens, "weights": args.weights, "nonzero": args.nonzero, "plot": args.plot}
    for name, value in ffns_only.items() if whole else ():
        if value is not None:
            raise MoefyError(f"--{name} is for FFNs alone: leave out --generate and --batches")
    if args.generate and args.generate[1] < 1:
        raise MoefyError(f"--generate at least one token, not {args.generate[1]}")
    settings = Settings(
        preset=args.preset or (None if args.model else "t5-base"),
        checkpoint=args.model,
        share=args.k,
        expert_size=args.expert_size,
        router=args.router,
        dtype=args.dtype or "float32",
        threads=args.threads,
        rounds=args.rounds,
        seconds=(300 if whole else 20) if args.seconds is None else args.seconds,
        implementations=tuple(args.implementations or NAMES),
    )
    if args.generate:
        return bench_model(settings, length=args.generate[0], new_tokens=args.generate[1])
    if args.batches:
        return bench_model(settings, batch=args.batches[0], length=args.batches[1])
    tokens, cold = tuple(args.tokens or TOKENS), args.weights != "warm"
    return bench_ffns(settings, tokens, cold=cold, nonzero=args.nonzero)
