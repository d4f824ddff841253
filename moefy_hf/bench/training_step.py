"""Time of a fine-tuning step of a MoEfied model against one of its dense self, in turns in one process.

    python -m moefy_hf.bench.training_step --csv model_cards/speed/training_step.csv

A BERT of the given size with random weights, ReLU, and random tokens; forward, backward and an AdamW step. "routed"
computes the share of experts that --share says, chosen by a linear router; "watched" also collects what
MoEficationCallback logs, as it does in the steps that are logged. Medians of the process' CPU seconds.
"""

import argparse
import time
from statistics import median

import torch
from transformers import BertConfig, BertForSequenceClassification, PreTrainedModel

from ..config import MoEficationConfig
from ..conversion.convert import moefy_
from ..io import write_csv
from ..loading import check_moefied
from ..training.monitor import RoutingMonitor

COLUMNS = ("hidden", "neurons", "layers", "batch", "length", "share", "threads", "dense_seconds", "routed", "watched")


class Training:
    """One model and its optimizer.

    Args:
        watched: whether routing is monitored, as in the steps that are logged.
    """

    def __init__(self, model: PreTrainedModel, watched: bool = False):
        self.model, self.monitor = model.train(), RoutingMonitor() if watched else None
        self.optimizer = torch.optim.AdamW(model.parameters(), 1e-5)
        if self.monitor is not None:
            self.monitor.attach(check_moefied(model))
            self.monitor.watching = True

    def seconds(self, batch: dict[str, torch.Tensor]) -> float:
        """Return the CPU seconds of one step."""
        started = time.process_time()
        self.model(**batch).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.monitor is not None:
            self.monitor.figures()
        return time.process_time() - started


def main() -> None:
    """Time steps as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=384)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--batches", nargs="*", default=["32x32", "16x128"], help="rows x tokens")
    parser.add_argument("--share", type=float, default=0.2)
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--csv", help="file to write all runs to")
    args = parser.parse_args()

    size = {"hidden_size": args.hidden, "intermediate_size": 4 * args.hidden, "num_hidden_layers": args.layers}
    config = BertConfig(**size, num_attention_heads=args.hidden // 32, hidden_act="relu", vocab_size=30_522)
    runs = []
    print(f"cpu, float32, {torch.get_num_threads()} threads")
    for rows, length in (map(int, shape.split("x")) for shape in args.batches):
        batch = {
            "input_ids": torch.randint(0, config.vocab_size, (rows, length)),
            "labels": torch.randint(0, 2, (rows,)),
        }
        trainings = []
        for routed, watched in ((False, False), (True, False), (True, True)):
            model = BertForSequenceClassification(config)
            if routed:
                selection = {"type": "top_k", "k": args.share, "allocation": "uniform"}
                convert = MoEficationConfig(splitter="random", selection=selection, calibration_tokens=2_000)
                moefy_(model, convert, [batch] * -(-4_000 // (rows * length)), progress=False)
            trainings.append(Training(model, watched))
        turns = [[training.seconds(batch) for training in trainings] for _ in range(args.steps + 2)][2:]
        dense, routed, watched = (median(seconds) for seconds in zip(*turns, strict=True))
        runs.append(
            (args.hidden, 4 * args.hidden, args.layers, rows, length, args.share, torch.get_num_threads())
            + tuple(f"{figure:.3f}" for figure in (dense, routed / dense, watched / dense))
        )
        print(f"{rows} x {length}: dense {dense:.3f} s, routed {routed / dense:.2f}, watched {watched / dense:.2f}")
    if args.csv:
        write_csv(args.csv, COLUMNS, runs)


if __name__ == "__main__":
    main()
