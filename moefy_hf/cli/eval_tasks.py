"""`moefy eval`: benchmark tasks of lm-eval on a MoEfied language model."""

import argparse
import json
from argparse import Namespace
from pathlib import Path
from typing import Any

from ..arguments import positive, share_or_count
from ..errors import MoefyError
from ..evaluation.benchmarks import run_benchmarks, task_manager
from ..hub.eval_results import write_eval_results
from ..hub.facts import add_facts
from ..io import check_files, write_whole
from .common import check_is_moefied, load_model, load_tokenizer, of_model, show_table

HELP = """Tasks are those of lm-eval (pip install 'moefy-hf[eval]'); `lm-eval ls tasks` lists them. Their data sets
come from the Hub, unless --include_path has tasks with files of yours.

Where MODEL is a folder, its card gets the table, and .eval_results gets what the Hub shows beside a model: one file
for each task whose data set is on the Hub. With --limit it gets none: a part of a task is no result.

examples:
  moefy eval smol-moe --tasks hellaswag arc_easy
  moefy eval smol-moe --tasks hellaswag --k 0.25 0.5 --batch_size 8 --output hellaswag.json
  moefy eval smol-moe --tasks my_task --include_path my_tasks --limit 100"""


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add the arguments of `moefy eval`."""
    of_model(command, run_tasks, show_table)
    command.add_argument("--tasks", nargs="+", metavar="TASK", required=True, help="tasks, groups or tags of lm-eval")
    command.add_argument("--include_path", metavar="DIR", help="folder with tasks of your own, as yaml files")
    shares = "budgets: shares of the experts, or their number; dense beside them (default: MODEL's budget alone)"
    command.add_argument("--k", type=share_or_count, nargs="+", help=shares)
    limit = "so many examples of each task, or so large a share of them; for trying out"
    command.add_argument("--limit", type=share_or_count, help=limit)
    command.add_argument("--batch_size", type=positive, default=1, help="examples at once (default: 1)")
    command.add_argument("--num_fewshot", type=int, help="examples in a prompt (default: the task's)")
    command.add_argument("--output", metavar="FILE", help="JSON file that gets the figures")
    command.epilog, command.formatter_class = HELP, argparse.RawDescriptionHelpFormatter


def run_tasks(args: Namespace) -> dict[str, Any]:
    """Run --tasks on MODEL; return rows, facts and the files that were written.

    Raises:
        MoefyError: lm-eval is not installed, an unknown task, a number out of range, or a file that cannot be written.
        NotMoefied: MODEL is dense.
        UnsupportedModel: MODEL is no language model.
    """
    if args.limit is not None and args.limit <= 0:
        raise MoefyError(f"--limit must be above 0, got {args.limit:g}")
    if args.num_fewshot is not None and args.num_fewshot < 0:
        raise MoefyError(f"--num_fewshot must not be negative, got {args.num_fewshot}")
    check_files(args.output, plot=None)
    task_manager(args.tasks, args.include_path)  # before a model is loaded
    model = check_is_moefied(args, load_model(args))
    settings = {name: vars(args)[name] for name in ("include_path", "limit", "batch_size", "num_fewshot")}
    result = run_benchmarks(model, load_tokenizer(args), args.tasks, args.k, **settings)
    written = []
    if Path(args.model).is_dir():
        add_facts(args.model, benchmarks=result)
        written = [str(path) for path in write_eval_results(args.model, result)]
    if args.output:
        write_whole(Path(args.output), json.dumps(result.to_dict(), indent=1))
    return {"table": result.table(), **result.to_dict(), "eval_results": written}
