"""`moefy sweep`: quality against compute, or the budget for a target."""

from argparse import Namespace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from ..conversion.thresholds import measure_reach
from ..data import TextBatches, read_labelled, read_lines
from ..evaluation.controls import BASELINES, check_control
from ..evaluation.search import search, share_within
from ..evaluation.sweep import Sweep, evaluate
from ..hub.facts import add_facts
from ..io import check_files
from ..measure.metrics import is_causal
from ..modeling.allocation import setting_name
from ..modeling.moefied import is_moefied
from .commands import load_model, load_tokenizer, text_batches


def sweep(args: Namespace) -> dict[str, Any]:
    check_arguments(args)
    texts = read_lines(args.texts) if args.texts else None
    calibration = read_lines(args.calibration_texts) if args.calibration_texts else None
    model = load_model(args)
    check_model(args, model)
    labels: list[int] | str | None = "next" if is_causal(model) else None
    if texts is None:
        texts, labels = read_labelled(args.csv, model.config)
    tokenizer = load_tokenizer(args)
    batches = text_batches(args, model, tokenizer, texts, labels)
    others = text_batches(args, model, tokenizer, calibration) if calibration else None
    own, known = model.config.moefication["selection"], model.config.moefication.get("reach", {})
    kinds = args.selections or [own["type"] if "k" in own or args.quality is not None else own]
    missing = [kind for kind in kinds if setting_name(kind) and kind not in known]  # of types, not of settings
    if missing and others is None:
        raise ValueError(f"what {', '.join(missing)} spend is measured on other texts: give --calibration_texts")
    measure_reach(model, others or [], missing)
    if args.quality is not None:
        return searched(args, model, batches, kinds)
    shares = [share_within(model, flops) for flops in args.flops] if args.flops else args.shares
    found = evaluate(model, batches, shares, controls=args.controls, selections=kinds, calibration=others)
    if Path(args.model).is_dir():
        add_facts(args.model, sweep=found, evaluation=Path(args.texts or args.csv).name)
    write(args, found)
    return {"table": found.table(), **found.to_dict()}


def check_arguments(args: Namespace) -> None:
    """Find what is wrong with them before any file is read."""
    if bool(args.texts) == bool(args.csv):
        raise ValueError("give --texts (perplexity, or agreement with the dense model) or --csv (accuracy)")
    for control in args.controls:
        check_control(control)
    check_files(args.output, plot=args.plot)
    if not args.calibration_texts and set(args.controls) & set(BASELINES):
        raise ValueError(f"{', '.join(BASELINES)} set thresholds on other texts: give --calibration_texts")


def check_model(args: Namespace, model: PreTrainedModel) -> None:
    if not is_moefied(model):
        raise ValueError(f"{args.model} is not MoEfied: moefy convert makes a checkpoint that is")
    if model.config.is_encoder_decoder and not model._get_name().endswith("Classification"):
        raise ValueError(
            "texts alone are no data for an encoder-decoder: use moefy_hf.evaluate on batches with labels"
        )
    if args.csv and is_causal(model):
        raise ValueError("a language model has no classes: give --texts")


def searched(args: Namespace, model: PreTrainedModel, batches: TextBatches, kinds: list[str]) -> dict[str, Any]:
    """The fewest experts that keep a quality, for each type of selection."""
    rows: list[dict[str, Any]] = []
    lines: list[str] = []
    for kind in kinds:
        selection, found = search(model, batches, args.quality, selection={"type": kind})
        rows += found.rows[bool(rows) :]
        settings = ", ".join(f"{name}={value!r}" for name, value in selection.items())
        lines.append(f"{args.quality:g} of dense: model.set_selection({settings})")
    whole = Sweep(rows, found.facts)
    write(args, whole)
    return {"table": "\n".join([whole.table(), "", *lines]), **whole.to_dict()}


def write(args: Namespace, found: Sweep) -> None:
    if args.output:
        found.save(args.output)
    if args.plot:
        found.plot(args.plot)
