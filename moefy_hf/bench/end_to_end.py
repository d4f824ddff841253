"""A MoEfied checkpoint against its dense self on texts, whole model: forward passes, or greedy generation with
--new_tokens. `moefy bench MODEL --generate` and `--batches` do the same on random tokens.

    python -m moefy_hf.bench.end_to_end my-moe --data held_out.txt --batch 32 --length 64 --facts
    python -m moefy_hf.bench.end_to_end my-moe --data held_out.txt --length 128 --new_tokens 32

Float32 on the CPU. Dense (the stock class on the same files), masked and sparse take turns in an order drawn anew;
ratios are medians of the rounds'. Outputs are compared before anything is timed.
"""

import argparse
import statistics
from dataclasses import replace
from typing import Any

import torch
from transformers import AutoTokenizer

from ..data import TextBatches, TextSource
from ..hub.facts import add_facts
from ..io import write_csv
from ..loading import routed
from .models import check, checkpoint_models, compare, model_rows, variants
from .settings import Settings
from .timing import hardware, threads_set


def main() -> None:
    """Time a checkpoint as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--data", required=True, help="as moefy bench --data")
    parser.add_argument("--batch", type=int, default=1, help="texts at once (default: 1)")
    parser.add_argument("--length", type=int, default=128, help="tokens of a text, at most (default: 128)")
    parser.add_argument("--new_tokens", type=int, default=0, help="generate so many (default: a forward pass)")
    parser.add_argument("--k", type=float, help="share of the experts (default: the checkpoint's budgets)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--output", help="csv file that gets the figures")
    parser.add_argument("--facts", action="store_true", help="add them to the checkpoint's facts, for its card")
    args = parser.parse_args()
    if min(args.batch, args.length, args.threads, args.rounds) < 1 or args.new_tokens < 0:
        parser.error("batch, length, threads and rounds must be positive")
    try:
        rows = measure(args)
    except (ValueError, OSError) as error:
        parser.error(" ".join(str(error).split()))
    for row in rows:
        print(", ".join(f"{name} {value}" for name, value in row.items()))
    if args.output:
        columns = [*rows[0], "hardware"]
        write_csv(args.output, columns, [[*row.values(), hardware()] for row in rows])
    if args.facts:
        add_facts(args.checkpoint, speed={"hardware": hardware(), "rows": rows})


@torch.no_grad()
def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Time the models, and return a row per implementation.

    Raises:
        MoefyError: the checkpoint is not MoEfied, or the texts cannot be read.
    """
    table = TextSource(args.data).open()
    names = ("masked", "cpu", "auto")
    settings = Settings(checkpoint=args.checkpoint, share=args.k, threads=args.threads, implementations=names)
    dense, model = checkpoint_models(settings)
    tokenizer = AutoTokenizer.from_pretrained(args.checkpoint)
    texts = replace(table.read(dense), targets=None)
    batches = list(TextBatches(texts, tokenizer, max_length=args.length, batch_size=args.batch))[: args.rounds]
    with threads_set(args.threads):
        models = {"dense": dense, **variants(model, names)}
        check(models, model, batches[0])
        taken = compare(models, batches, args.new_tokens, float("inf"), "rounds", progress=True)
    tokens = int(statistics.median(batch["input_ids"].numel() for batch in batches))
    acts = [routed(site) for site in model.moe_sites()]
    share = round(sum(act.k or 0 for act in acts) / sum(act.num_experts for act in acts), 3)
    return [
        {
            "implementation": row["implementation"],
            "times_dense": round(row["ratio"], 2),
            "milliseconds": round(row["milliseconds"], 2),
            "share": share,
            "batch": args.batch,
            "tokens": tokens,
            "new_tokens": args.new_tokens,
            "threads": args.threads,
            "dtype": "float32",
            "rounds": row["rounds"],
        }
        for row in model_rows(taken, tokens, args.new_tokens)
    ]


if __name__ == "__main__":
    main()
