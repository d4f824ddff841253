"""The command `moefy bench`: it takes parsed arguments and returns figures, with their table."""

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

from ..errors import MoefyError
from ..evaluation.plots import plot_bench
from ..io import check_files, write_whole
from .ffns import TOKENS, bench_ffns
from .models import bench_model
from .report import save_csv, table
from .settings import Settings

FIGURES = (".json", ".csv")


def run_bench(args: Namespace) -> dict[str, Any]:
    """Time whole models with `--generate` or `--batches`, else FFNs.

    Raises:
        MoefyError: arguments that do not go together, or as `Settings`.
    """
    check_files(*args.output, plot=args.plot)
    for path in args.output:
        if Path(path).suffix not in FIGURES:
            raise MoefyError(f"--output writes {' or '.join(FIGURES)}, got {path}")
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
        dtype=args.dtype,
        threads=args.threads,
        rounds=args.rounds,
        seconds=(300 if whole else 20) if args.seconds is None else args.seconds,
        implementations=tuple(args.implementations),
    )
    if args.generate:
        figures = bench_model(settings, length=args.generate[0], new_tokens=args.generate[1])
    elif args.batches:
        figures = bench_model(settings, batch=args.batches[0], length=args.batches[1])
    else:
        tokens, cold = tuple(args.tokens or TOKENS), args.weights != "warm"
        figures = bench_ffns(settings, tokens, cold=cold, nonzero=args.nonzero)
    for path in args.output:
        if path.endswith(".csv"):
            save_csv(figures, path)
        else:
            write_whole(Path(path), json.dumps(figures, indent=1))
    if args.plot:
        plot_bench(figures, args.plot)
    return figures | {"table": table(figures)}
