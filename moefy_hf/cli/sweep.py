"""`moefy sweep`: quality against compute, or the budget for a quality."""

import argparse
from argparse import Namespace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from ..arguments import share_or_count
from ..conversion.thresholds import calibrate_thresholds_
from ..data import TextBatches
from ..errors import MoefyError
from ..evaluation.controls import BASELINES, CONTROLS, check_control
from ..evaluation.search import search, share_within
from ..evaluation.sweep import Sweep, evaluate
from ..hub.facts import add_facts
from ..io import check_files
from ..measure.metrics import is_causal
from ..modeling.section import Section
from ..modeling.selection import SELECTIONS
from ..modeling.selection_config import setting_name
from .common import (
    DATA,
    add_data,
    check_is_moefied,
    load_model,
    load_tokenizer,
    of_model,
    open_data,
    show_table,
    text_batches,
)
from .launched import joined
from .offloading import add_offload, wants_offload

MEASURES = "accuracy with labels or targets; of a language model perplexity; else agreement with the dense model"


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add the arguments of `moefy sweep`."""
    of_model(command, sweep, show_table)
    add_data(command, required=True, help=f"{DATA}: {MEASURES}")
    add_offload(command)
    budgets = command.add_mutually_exclusive_group()
    shares, default = "budgets: shares of the experts, or their number", [0.1, 0.2, 0.3, 0.5]
    budgets.add_argument("--k", type=share_or_count, nargs="+", default=default, help=shares)
    budgets.add_argument("--flops", type=float, nargs="+", help="shares of the dense FFNs' FLOPs, routers included")
    quality = "find the fewest experts that keep so much of the dense model's: accuracy of at least 0.98 of it, say, "
    budgets.add_argument("--quality", type=float, help=f"{quality}or perplexity of at most 1.05 of it")
    kinds = "types to compare (default: the model's; one with a threshold instead of a budget is measured as it is)"
    command.add_argument("--selections", nargs="+", choices=list(SELECTIONS), help=kinds)
    known = ", ".join((*CONTROLS, *BASELINES))
    command.add_argument("--controls", nargs="*", default=["oracle", "random"], help=f"of {known}")
    command.add_argument(
        "--calibration",
        help=f"other texts, as --data, for the thresholds of {', '.join(BASELINES)}, and for what selections other "
        "than top_k compute, where the model does not know",
    )
    command.add_argument("--output", metavar="FILE", help="JSON file that gets the figures")
    command.add_argument("--plot", metavar="FILE", help="picture of quality against FLOPs (needs matplotlib)")


def sweep(args: Namespace) -> dict[str, Any] | None:
    """Measure MODEL at several budgets, or find the budget for a quality; return rows and facts, in the process that
    writes.

    Raises:
        MoefyError: wrong arguments, texts that cannot be read, or a model that cannot be measured on texts.
        NotMoefied: MODEL is dense.
    """
    check_arguments(args)
    processes = joined(args.data, args.calibration)
    tables = [open_data(args, path) for path in (args.data, args.calibration) if path]
    model = load_model(args, offloaded=processes.by_first(lambda: wants_offload(args)))
    check_is_moefied(args, model)
    tokenizer = load_tokenizer(args)
    texts = tables[0].read(model, labels=True)
    if model.config.is_encoder_decoder and model.can_generate() and texts.targets is None:
        raise MoefyError(tables[0].lacking("target"))
    batches = text_batches(args, model, tokenizer, texts, "next" if is_causal(model) else None)
    others = text_batches(args, model, tokenizer, tables[1].read(model)) if args.calibration else None
    selection, known = Section(model.config).selection, Section(model.config).thresholds
    budgeted = "k" in selection or args.quality is not None
    kinds = args.selections or [selection["type"] if budgeted else selection]
    missing = [kind for kind in kinds if setting_name(kind) and kind not in known]  # of types, not of thresholds
    if missing and others is None:
        raise MoefyError(f"what {', '.join(missing)} compute is measured on other texts: give --calibration")
    calibrate_thresholds_(model, others or [], missing, progress=processes.first)
    options: dict[str, Any] = {"progress": processes.first, "processes": processes}
    lines: list[str] = []
    if args.quality is not None:
        result, lines = searched(model, batches, args.quality, kinds, **options)
    else:
        shares = [share_within(model, flops) for flops in args.flops] if args.flops else args.k
        which = {"controls": args.controls, "selections": kinds, "calibration": others}
        result = evaluate(model, batches, shares, **which, **options)
    if not processes.first:
        return None
    if args.quality is None and Path(args.model).is_dir():
        add_facts(args.model, sweep=result, evaluation=tables[0].source.name)
    write(args, result)
    return {"table": "\n".join([result.table(), *lines]), **result.to_dict()}


def check_arguments(args: Namespace) -> None:
    """Check arguments before any file is read.

    Raises:
        MoefyError: an unknown control, a file that cannot be written, or a control that needs --calibration.
    """
    for control in args.controls:
        check_control(control)
    check_files(args.output, plot=args.plot)
    if not args.calibration and set(args.controls) & set(BASELINES):
        raise MoefyError(f"{', '.join(BASELINES)} set thresholds on other texts: give --calibration")


def searched(
    model: PreTrainedModel, batches: TextBatches, quality: float, kinds: list[str], **options: Any
) -> tuple[Sweep, list[str]]:
    """Find the fewest experts that have a quality; return all rows that were measured, and lines for below them.

    Args:
        model: the MoEfied model.
        batches: what is measured on.
        quality: relative to the dense model's.
        kinds: the types of selection, each searched by itself.
        options: of `search`.
    """
    rows: list[dict[str, Any]] = []
    lines = [""]
    for kind in kinds:
        selection, searched_sweep = search(model, batches, quality, selection={"type": kind}, **options)
        rows += searched_sweep.rows[bool(rows) :]
        settings = ", ".join(f"{name}={value!r}" for name, value in selection.items())
        lines.append(f"{quality:g} of dense: model.set_selection({settings})")
    return Sweep(rows, searched_sweep.facts), lines


def write(args: Namespace, result: Sweep) -> None:
    """Write the files that --output and --plot name."""
    if args.output:
        result.save(args.output)
    if args.plot:
        result.plot(args.plot)
