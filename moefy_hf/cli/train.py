"""`moefy train`: fine-tune, convert, recover and measure a model on a task, in one run."""

import argparse
import contextlib
import sys
from argparse import Namespace
from typing import Any

from ..recipes.tasks import TASKS, task

ABOUT = """tasks:
{tasks}

`moefy train TASK --help` lists the settings of a task, and the stages of a run. A stage that is finished is
skipped when the command is given again. One process, and several:

  moefy train classification --model_name_or_path google-bert/bert-base-uncased --dataset_name stanfordnlp/sst2 \\
      --text_column sentence --test_split validation --output_dir sst2
  moefy train causal_lm --config settings.yaml --k 0.5 --recovery_epochs 1
  accelerate launch --num_processes 2 -m moefy_hf.cli train classification --config settings.yaml"""


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add the arguments of `moefy train`; those of a task are read by the task."""
    command.usage = "moefy train TASK [--config FILE.yaml ...] [--SETTING VALUE ...] [--json]"
    command.formatter_class = argparse.RawDescriptionHelpFormatter
    width = max(map(len, TASKS))
    command.epilog = ABOUT.format(tasks="\n".join(f"  {name:{width}}  {about}" for name, about in TASKS.items()))
    command.add_argument("task", metavar="TASK", choices=[*TASKS], help="what is learned, one of those below")
    settings = "of the task and of the conversion, in YAML files or here; --json prints JSON at the end"
    command.add_argument("settings", metavar="SETTINGS", nargs=argparse.REMAINDER, help=settings)
    command.set_defaults(run=train, show=lambda result: result["table"], json=False)


def train(args: Namespace) -> dict[str, Any] | None:
    """Run a task; return scores, models and their table, in the process that writes.

    Raises:
        SystemExit: of status 2, where settings or data are found wrong.
    """
    from ..recipes.tasks.base import run

    args.json = "--json" in args.settings
    words = [word for word in args.settings if word != "--json"]
    with contextlib.redirect_stdout(sys.stderr) if args.json else contextlib.nullcontext():
        return run(task(args.task), words, f"moefy train {args.task}")
