"""`moefy convert`: a dense checkpoint becomes a MoEfied one."""

import argparse
from argparse import Namespace
from dataclasses import fields, is_dataclass
from typing import Any

from huggingface_hub import HfApi
from transformers import PreTrainedModel, TrainingArguments

from ..arguments import add_arguments as add_settings
from ..arguments import as_words, given, read_yaml
from ..config import SETTINGS, MoEficationConfig, overrule
from ..conversion.checks import check_convertible
from ..conversion.convert import moefy_
from ..data import TextBatches, split_off
from ..errors import MoefyError
from ..evaluation.quality_check import QualityCheck, check_quality
from ..hub.facts import add_facts
from ..hub.push import add_license
from ..io import written_whole
from ..measure.metrics import is_causal
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


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add the arguments of `moefy convert`."""
    of_model(command, convert, show_table)
    command.add_argument("output", metavar="OUTPUT", help=NEW_FOLDER)
    help = f"what splits and routers are fitted on: {DATA}"
    add_data(command, required=False, help=help, seed=False, leave_out=("label_column",))
    command.add_argument("--config", metavar="FILE", help="YAML file with any of the settings below, or a recipe's")
    command.add_argument("--force", action="store_true", help="write the model even if it is of no use as it is")
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


def convert(args: Namespace) -> dict[str, Any]:
    """Convert MODEL, check its quality, and save it; return the report.

    Raises:
        MoefyError: what `moefy_` finds wrong, or a model that is of no use right after conversion, without --force.
    """
    output, config = new_folder(args.output), config_of(args)
    args.seed = config.seed
    table = open_data(args) if args.data else None
    model = load_model(args)
    check_convertible(model, config, table)
    batches, held_out = None, None
    if table is not None:
        tokenizer = load_tokenizer(args)
        tokens = config.calibration_tokens * 20 // 19 + 1  # with those that are held out
        texts = read_for_calibration(args, table, model, tokenizer, tokens)
        fit_texts, check_texts = split_off(texts)
        batches = text_batches(args, model, tokenizer, fit_texts)
        held_out = text_batches(args, model, tokenizer, check_texts, "next" if is_causal(model) else None)
    report = moefy_(model, config, batches)
    check, line = check_of(model, held_out)
    if check is not None and check.degenerate and not args.force:
        raise MoefyError(f"{check.message()}; nothing was written (--force writes it all the same)")
    with written_whole(output) as folder:
        save_beside(args, model, folder)
        calibration = table and table.source.name
        add_facts(folder, conversion=report, calibration=calibration, prediction=check)
        add_license(folder, HfApi())
    result = {"output": str(output), "table": f"{report.table()}\n\n{line}", **report.to_dict()}
    return result | {"prediction": check and check.to_dict()}


def check_of(model: PreTrainedModel, held_out: TextBatches | None) -> tuple[QualityCheck | None, str]:
    """Check the quality of a model that was just converted; return the check, if any, and a line that says it.

    Args:
        model: the MoEfied model.
        held_out: texts that it was not fitted on.
    """
    if held_out is None or not len(held_out):
        return None, "quality is not predicted without --data: moefy sweep measures it"
    try:
        check = check_quality(model, held_out)
    except ValueError as error:  # a model without a head, or a regression
        return None, f"quality is not predicted: {error}"
    if check.bad:
        logger.warning(check.message())
    return check, f"predicted: {check.line()}"
