"""A MoEfied checkpoint against its dense self, whole model: forward passes, or greedy generation with --new_tokens.

    python -m moefy_hf.benchmarks.end_to_end my-moe --texts held_out.txt --batch 32 --length 64 --facts
    python -m moefy_hf.benchmarks.end_to_end my-moe --texts held_out.txt --length 128 --new_tokens 32

Float32 on the CPU. Dense (the stock class on the same files), masked and sparse take turns in an order drawn anew;
ratios are medians of the rounds'. Outputs are compared before anything is timed.
"""

import argparse
import random
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoTokenizer

from ..architectures import load_checkpoint
from ..bench import hardware
from ..facts import add_facts
from ..modeling.moefied import is_moefied
from ..text_files import TextBatches, read_lines
from .tables import write_csv


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--texts", required=True, help="text file, one text per line")
    parser.add_argument("--batch", type=int, default=1, help="texts at once (default: 1)")
    parser.add_argument("--length", type=int, default=128, help="tokens of a text, at most (default: 128)")
    parser.add_argument("--new_tokens", type=int, default=0, help="generate so many (default: a forward pass)")
    parser.add_argument("--k", type=float, help="share of the experts (default: the checkpoint's budgets)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--csv", help="file that gets the figures")
    parser.add_argument("--facts", action="store_true", help="add them to the checkpoint's facts, for its card")
    args = parser.parse_args()
    if min(args.batch, args.length, args.threads, args.rounds) < 1 or args.new_tokens < 0:
        parser.error("batch, length, threads and rounds must be positive")
    torch.set_num_threads(args.threads)
    try:
        rows = measure(args)
    except (ValueError, OSError) as error:
        parser.error(" ".join(str(error).split()))
    for row in rows:
        print(", ".join(f"{name} {value}" for name, value in row.items()))
    if args.csv:
        write_csv(args.csv, list(rows[0]), [list(row.values()) for row in rows])
    if args.facts:
        shown = [
            {name: value for name, value in row.items() if name not in ("checkpoint", "hardware")} for row in rows
        ]
        add_facts(args.checkpoint, speed={"hardware": hardware(), "rows": shown})


@torch.inference_mode()
def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    texts = read_lines(args.texts)
    model = load_checkpoint(args.checkpoint, dtype=torch.float32).eval()
    if not is_moefied(model):
        raise ValueError(f"{args.checkpoint} is not MoEfied: moefy convert makes a checkpoint that is")
    dense = model.stock_class().from_pretrained(args.checkpoint, dtype=torch.float32).eval()
    if args.k is not None:
        model.set_selection(k=args.k, allocation="uniform")
    tokenizer = AutoTokenizer.from_pretrained(args.checkpoint)
    batches = list(TextBatches(texts, tokenizer, max_length=args.length, batch_size=args.batch))[: args.rounds]

    def run(each: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        if args.new_tokens:
            length = {"min_new_tokens": args.new_tokens, "max_new_tokens": args.new_tokens}
            return each.generate(**batch, do_sample=False, pad_token_id=0, **length)
        return each(**batch).logits

    def sparse(name: str) -> Callable:
        def call(batch: dict[str, torch.Tensor]) -> torch.Tensor:
            return run(model, batch)

        return lambda batch: (model.set_moe_implementation(name), call)[1]

    methods = {
        "dense": lambda batch: lambda batch: run(dense, batch),
        "masked": sparse("masked"),
        "cpu": sparse("cpu"),
    }
    check(model, batches[0])
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    order, draw = list(methods), random.Random(0)
    for batch in batches:
        draw.shuffle(order)
        for name in order:
            call = methods[name](batch)  # sets the implementation, which is not timed
            started = time.perf_counter()
            call(batch)
            seconds[name].append(time.perf_counter() - started)
    experts = sum(site.act.k for site in model.moe_sites())
    share = experts / sum(site.act.num_experts for site in model.moe_sites())
    tokens = statistics.median(batch["input_ids"].numel() for batch in batches)
    settings = {"share": round(share, 3), "batch": args.batch}
    settings |= {"tokens": int(tokens), "new_tokens": args.new_tokens, "threads": args.threads, "dtype": "float32"}
    return [
        {
            "implementation": name,
            "times_dense": round(statistics.median(a / b for a, b in zip(seconds["dense"], taken, strict=True)), 2),
            "milliseconds": round(1e3 * statistics.median(taken), 2),
            **settings,
            "rounds": len(batches),
            "hardware": hardware(),
        }
        for name, taken in seconds.items()
    ]


def check(model: Any, batch: dict[str, torch.Tensor]) -> None:
    model.set_moe_implementation("masked")
    masked = model(**batch).logits
    model.set_moe_implementation("cpu")
    found = model(**batch).logits
    if not (found - masked).norm() <= 1e-3 * masked.norm():
        raise RuntimeError("sparse and masked outputs differ: nothing was timed")


if __name__ == "__main__":
    main()
