"""`moefy profile`: how sparse a model's FFNs are on texts."""

import argparse
from argparse import Namespace
from dataclasses import asdict
from typing import Any

from ..arguments import positive
from ..config import MoEficationConfig
from ..errors import MoefyError
from ..measure.metrics import is_causal
from ..measure.profile import profile
from ..measure.sparsity import cett_curves, ppl_activation
from ..measure.sparsity_table import describe_ffn, profile_table
from ..modeling.ffn_sites import find_sites
from .common import (
    add_data,
    add_towers,
    load_model,
    load_tokenizer,
    of_model,
    open_data,
    read_for_calibration,
    show_table,
    text_batches,
)


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add the arguments of `moefy profile`."""
    of_model(command, profile_model, show_table)
    add_data(command, required=True, leave_out=("label_column",))
    tokens = MoEficationConfig.calibration_tokens
    command.add_argument(
        "--calibration_tokens", type=positive, default=tokens, help=f"use at most so many (default: {tokens})"
    )
    add_towers(command)
    command.add_argument(
        "--ppl",
        type=float,
        metavar="PERCENT",
        help="also find how many neurons are needed for perplexity to grow by so much; some ten passes",
    )


def profile_model(args: Namespace) -> dict[str, Any]:
    """Measure how sparse MODEL's FFNs are; return a row for each.

    Raises:
        MoefyError: texts that cannot be read, or --ppl of a model that is no language model.
    """
    if args.ppl is not None and not args.ppl > 0:
        raise MoefyError(f"--ppl is a growth in percent, more than 0: got {args.ppl}")
    table = open_data(args)
    model, tokenizer = load_model(args), load_tokenizer(args)
    texts = read_for_calibration(args, table, model, tokenizer, args.calibration_tokens)
    batches = text_batches(args, model, tokenizer, texts)
    if args.ppl is not None and not is_causal(model):
        raise MoefyError(f"--ppl needs a language model, whose labels are the texts; {model._get_name()} is none")
    with profile(model, batches, max_tokens=args.calibration_tokens, sample=False, towers=args.towers) as stats:
        profiled = stats.batches
    curves = cett_curves(model, profiled, towers=args.towers)
    rows = [
        {"ffn": site.name, **describe_ffn(site_stats, curve)}
        for site, site_stats, curve in zip(find_sites(model, args.towers), stats.sites, curves, strict=True)
    ]
    result: dict[str, Any] = {"tokens": stats.tokens, "cett_tokens": curves[0].tokens, "rows": rows}
    if args.ppl is not None:
        labelled = [
            {**batch, "labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}
            for batch in profiled
        ]
        ppl = ppl_activation(model, labelled, curves, args.ppl / 100, towers=args.towers)
        result["ppl"] = asdict(ppl)
        for row, active in zip(rows, ppl.active, strict=True):
            row["active_at_ppl"] = active
    return result | {"table": profile_table(result)}
