"""`moefy convert`: a dense checkpoint becomes a MoEfied one."""

import argparse
import shutil
from argparse import Namespace
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from transformers import PreTrainedModel, TrainingArguments

from ..arguments import add_arguments as add_settings
from ..arguments import as_words, given, read_yaml
from ..config import SETTINGS, MoEficationConfig, overrule
from ..conversion.checks import check_convertible
from ..conversion.convert import moefy_
from ..data import TextBatches, TextTable, split_off
from ..errors import MoefyError
from ..evaluation.quality_check import QualityCheck, check_quality
from ..hub.facts import add_facts
from ..hub.push import add_license
from ..io import written_whole
from ..measure.metrics import is_causal
from ..modeling.offload import is_offloaded
from ..planning.held_out import ROWS
from ..planning.plan import HELD_OUT
from ..recipes import arguments as recipe_arguments
from .common import (
    DATA,
    NEW_FOLDER,
    add_data,
    load_model,
    load_tokenizer,
    logger,
    new_folder,
    of_model,
    open_data,
    read_for_calibration,
    save_beside,
    show_table,
    text_batches,
)
from .launched import joined
from .offloading import add_offload, wants_offload
from .planned import EXIT_CODE, add_plan, found_plan, is_planned


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add the arguments of `moefy convert`."""
    of_model(command, convert, show_table)
    command.add_argument("output", metavar="OUTPUT", nargs="?", help=NEW_FOLDER)
    help = f"what splits and routers are fitted on: {DATA}"
    add_data(command, required=False, help=help, seed=False)
    command.add_argument("--config", metavar="FILE", help="YAML file with any of the settings below, or a recipe's")
    command.add_argument("--force", action="store_true", help="write the model even if it is of no use as it is")
    add_offload(command)
    add_plan(command)
    add_settings(command, MoEficationConfig, flags=True)


def config_of(args: Namespace) -> MoEficationConfig:
    """Read the settings of a conversion: of --config and, where it says something else, the command line.

    Raises:
        MoefyError: a name in the file that is neither a conversion's nor a recipe's, or a setting out of range.
    """
    settings = read_yaml(args.config) if args.config else {}
    if unknown := sorted(settings.keys() - {*SETTINGS} - (names_of_recipes() if settings else set())):
        raise MoefyError(f"{args.config} has unknown settings {', '.join(unknown)}; choose from {', '.join(SETTINGS)}")
    parser = argparse.ArgumentParser(prog=f"moefy convert --config {args.config}", usage=argparse.SUPPRESS)
    add_settings(parser, MoEficationConfig)
    conversion = {name: value for name, value in settings.items() if name in SETTINGS}
    from_file = given(parser.parse_args(as_words(conversion)), MoEficationConfig)
    if unread := sorted(settings.keys() - {*SETTINGS}):
        logger.warning(f"of {args.config}, recipes alone read {', '.join(unread)}")
    said = given(args, MoEficationConfig)
    return MoEficationConfig(**overrule(from_file | said, said.keys()))


def names_of_recipes() -> set[str]:
    """Return the settings of recipes, which convert, train and measure."""
    classes = [cls for cls in vars(recipe_arguments).values() if is_dataclass(cls)]
    return {field.name for cls in (TrainingArguments, *classes) for field in fields(cls)}


def convert(args: Namespace) -> dict[str, Any] | None:
    """Convert MODEL, check its quality, and save it; return the report, in the process that writes.

    With a goal its settings are found first, and nothing is written where none reaches it.

    Raises:
        MoefyError: what `moefy_` and `plan` find wrong, or a model that is of no use right after conversion, without
            --force.
    """
    processes = joined(args.data, args.validation)
    planned, config = is_planned(args), config_of(args)
    if planned and args.offload == "yes":
        raise MoefyError(
            "a plan tries copies of the model in memory: --offload yes goes with settings (--k ...) alone"
        )
    if planned and processes.size > 1:
        raise MoefyError("a plan times models, which other processes disturb: plan in one process")
    output = output_of(args)
    args.seed = config.seed
    table = open_data(args) if args.data else None
    offloaded = not planned and processes.by_first(lambda: wants_offload(args))
    model = load_model(args, offloaded=offloaded)
    if not planned:  # a plan has settings of its own
        check_convertible(model, config, table)
    batches, held_out, result, speed = None, None, dict[str, Any](), None
    if table is not None:
        batches, held_out = batches_of(args, model, table, config, planned)
    if planned and batches is not None and held_out is not None:
        found = found_plan(args, model, config, batches, held_out)
        result = {"plan": found.to_dict(), "table": f"{found.table()}\n\n{found.line()}"}
        if found.chosen is None:
            return result | {"exit_code": EXIT_CODE}
        config, speed = found.chosen.settings, found.speed()
    if output is None:
        return result
    work = output.with_name(f".{output.name}.work") if is_offloaded(model) else None
    report = moefy_(model, config, batches, work_dir=work, progress=processes.first, processes=processes)
    facts = {"conversion": report, "calibration": table and table.source.name, "speed": speed}
    check, line = processes.by_first(lambda: checked_and_saved(args, model, held_out, output, facts))
    if work and processes.first:
        shutil.rmtree(work)
    if not processes.first:
        return None
    written = {"output": str(output), "table": "\n\n".join(filter(None, (result.get("table"), report.table(), line)))}
    return result | report.to_dict() | written | {"prediction": check and check.to_dict()}


def checked_and_saved(
    args: Namespace, model: PreTrainedModel, held_out: TextBatches | None, output: Path, facts: dict[str, Any]
) -> tuple[QualityCheck | None, str]:
    """Check the quality of a model that was just converted, and save it; return what `check_of` does.

    Raises:
        MoefyError: it is of no use, and --force is not given.
    """
    check, line = check_of(model, held_out)
    if check is not None and check.degenerate and not args.force:
        raise MoefyError(f"{check.message()}; nothing was written (--force writes it all the same)")
    with written_whole(output) as folder:
        save_beside(args, model, folder)
        add_facts(folder, **facts, prediction=check)
        add_license(folder, HfApi())
    return check, line


def output_of(args: Namespace) -> Path | None:
    """Return the folder that is going to be made, or None where nothing is written.

    Raises:
        MoefyError: OUTPUT is missing, or exists.
    """
    if args.output is None and not args.dry_run:
        raise MoefyError("OUTPUT is missing: the folder that gets the model")
    return None if args.dry_run else new_folder(args.output)


def batches_of(
    args: Namespace, model: PreTrainedModel, table: TextTable, config: MoEficationConfig, planned: bool
) -> tuple[TextBatches, TextBatches]:
    """Read texts to fit on, and others to check quality on: a plan compares more of them, with their labels.

    Raises:
        MoefyError: what `TextTable.read` finds wrong.
    """
    tokenizer = load_tokenizer(args)
    every, most = (HELD_OUT, ROWS) if planned else (20, 64)
    tokens = config.calibration_tokens * every // (every - 1) + 1  # with those that are held out
    texts = read_for_calibration(args, table, model, tokenizer, tokens, labels=planned)
    if planned and args.validation:
        others = open_data(args, args.validation).read(model, labels=True, most=ROWS)
    else:
        texts, others = split_off(texts, every, most)
    made = text_batches(args, model, tokenizer, texts)
    return made, text_batches(args, model, tokenizer, others, "next" if is_causal(model) else None)


def check_of(model: PreTrainedModel, held_out: TextBatches | None) -> tuple[QualityCheck | None, str]:
    """Check the quality of a model that was just converted; return the check, if any, and a line that says it.

    Args:
        model: the MoEfied model.
        held_out: texts that it was not fitted on.
    """
    if is_offloaded(model):
        return None, "quality is not predicted where weights stay on disk: moefy sweep measures it"
    if held_out is None or not len(held_out):
        return None, "quality is not predicted without --data: moefy sweep measures it"
    try:
        check = check_quality(model, held_out)
    except ValueError as error:  # a model without a head, or a regression
        return None, f"quality is not predicted: {error}"
    if check.bad:
        logger.warning(check.message())
    return check, f"predicted: {check.line()}"
