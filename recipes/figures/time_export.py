#!/usr/bin/env python
"""How fast is an exported checkpoint? Timed beside the dense and the MoEfied model, in float32 on the CPU.

    python recipes/figures/time_export.py my-moe my-granitemoe --texts held_out.txt --length 128 --output prompts.csv
    python recipes/figures/time_export.py my-moe my-granitemoe --texts held_out.txt --new_tokens 32 --output decode.csv

The export runs with every implementation of experts that transformers has for CPUs. Beside it run the dense model, and
the MoEfied one masked and in the C++ kernel, at the export's budget. All take turns, in an order drawn anew. `ratio`,
how many times as fast as dense, is the median of the rounds'. Outputs are compared before anything is timed.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from moefy_hf.bench.models import Batch, check, checkpoint_models, compare, forward, model_rows, variants
from moefy_hf.bench.settings import Settings
from moefy_hf.bench.timing import hardware, threads_set
from moefy_hf.io import write_csv

IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")  # of experts, in transformers
OURS = ("masked", "cpu")
TOLERANCE = 1e-3  # of the norm of a token's logits, for half of the tokens: rounding may choose other experts at a few


def main() -> None:
    args = parser().parse_args()
    try:
        rows = measure(args)
        if args.output:
            write_csv(args.output, [*rows[0], "hardware"], [[*row.values(), hardware()] for row in rows])
    except (ValueError, OSError) as error:
        sys.exit(f"time_export.py: {' '.join(str(error).split())}")
    for row in rows:
        print(", ".join(f"{name} {value}" for name, value in row.items()))


def parser() -> argparse.ArgumentParser:
    added = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    added.add_argument("moefied", type=Path, help="MoEfied checkpoint, a local directory with its tokenizer")
    added.add_argument("exported", type=Path, help="what `moefy export` made of it")
    added.add_argument("--texts", type=Path, required=True, help="text to run on")
    added.add_argument("--batch", type=int, default=1, help="texts at once (default: 1)")
    added.add_argument("--length", type=int, default=128, help="tokens of a text (default: 128)")
    added.add_argument("--new_tokens", type=int, default=0, help="generate so many (default: a forward pass)")
    added.add_argument("--threads", type=int, default=1)
    added.add_argument("--rounds", type=int, default=20, help="timings of each (default: 20)")
    added.add_argument("--output", type=Path, help="csv file that gets the figures")
    return added


@torch.no_grad()
def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Time the models; return a row for each.

    Raises:
        ValueError: the checkpoints are not a MoEfied one and a served MoE made of it, or the text is too short.
    """
    if min(args.batch, args.length, args.threads, args.rounds) < 1 or args.new_tokens < 0:
        raise ValueError("batch, length, threads and rounds must be positive")
    budget = AutoConfig.from_pretrained(args.exported).to_dict().get("num_experts_per_tok")
    if budget is None:
        raise ValueError(f"{args.exported} is no served MoE: make it with moefy export --to granitemoe")
    batches = read_batches(args)
    settings = Settings(checkpoint=str(args.moefied), threads=args.threads, implementations=OURS)
    dense, model = checkpoint_models(settings)
    served = {}
    for name in IMPLEMENTATIONS:
        each = AutoModelForCausalLM.from_pretrained(args.exported, dtype=torch.float32, experts_implementation=name)
        served[f"exported, {name}"] = each.eval()
    model.set_selection(k=budget, allocation="uniform")
    with threads_set(args.threads):
        ours = {"dense": dense, **variants(model, OURS)}
        check(ours, model, batches[0])
        check_served(served, model, batches[0])
        taken = compare(ours | served, batches, args.new_tokens, float("inf"), "rounds", progress=True)
    facts = {"k": budget, "experts": model.moe_sites()[0].act.num_experts, "batch": args.batch}
    return [row | facts | {"threads": args.threads} for row in model_rows(taken, args.length, args.new_tokens)]


def read_batches(args: argparse.Namespace) -> list[Batch]:
    """As many batches (batch, length) of consecutive tokens as there are rounds."""
    ids = AutoTokenizer.from_pretrained(args.moefied)(args.texts.read_text(encoding="utf-8"))["input_ids"]
    needed = args.rounds * args.batch * args.length
    if len(ids) < needed:
        raise ValueError(f"{args.texts} has {len(ids)} tokens, {needed} are needed")
    rounds = torch.tensor(ids[:needed]).view(args.rounds, args.batch, args.length)
    return [{"input_ids": each, "attention_mask": torch.ones_like(each)} for each in rounds]


def check_served(served: dict[str, PreTrainedModel], model: PreTrainedModel, batch: Batch) -> None:
    """Check that an export gives the MoEfied model's logits.

    Raises:
        ValueError: one does not.
    """
    expected = forward(model, batch)
    for name, each in served.items():
        error = float(((forward(each, batch) - expected).norm(dim=-1) / expected.norm(dim=-1)).median())
        if not error <= TOLERANCE:
            raise ValueError(
                f"{name}: logits differ by {error:.1e} of their norm: it is not exact, or of another model"
            )


if __name__ == "__main__":
    main()
