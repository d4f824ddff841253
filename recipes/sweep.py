"""Compare splits and routers on one task: quality against compute, over seeds, without training after conversion.

    python recipes/sweep.py --config recipes/configs/minilm_movie/moefication.yaml --seeds 0 1 2 --facts facts.json

For every seed the dense model is fine-tuned as moefy_classification.py does (or found finished), profiled once, and
converted with every split; every router is fitted on every split. Finished cells are not computed again. FACTS gets
every figure, averaged over seeds; sweep_tables.py prints them.
"""

import copy
import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
import transformers
from common import (
    DataArguments,
    ModelArguments,
    MoeficationArguments,
    parse,
)
from moefy_classification import begin, make_model
from pipeline import train_dense
from run import Run, moefication_config, swept
from stages import write_json
from sweep_tables import average, own_name, tables
from transformers import TrainingArguments

from moefy_hf import evaluate, moefy_, profile
from moefy_hf.measure.profile import ModelProfile


@dataclass
class SweepArguments:
    """The grid."""

    facts: str = field(metadata={"help": "JSON file that gets the figures"})
    seeds: list[int] = field(default_factory=lambda: [0], metadata={"help": "seeds of fine-tuning, split and routers"})
    eval_rows: int | None = field(
        default=None,
        metadata={"help": "measure on so many rows of validation and test together (seeded); default all"},
    )
    splitters: list[str] = field(
        default_factory=lambda: ["random", "parameter_clustering", "coactivation"],
        metadata={"help": "splits to compare"},
    )
    routers: list[str] = field(
        default_factory=lambda: ["linear", "mlp", "similarity"], metadata={"help": "routers to compare"}
    )


def main() -> None:
    model_args, data_args, moe_args, training_args, grid = parse(
        (ModelArguments, DataArguments, MoeficationArguments, TrainingArguments, SweepArguments), __doc__
    )
    for splitter in grid.splitters:
        for router in grid.routers:
            moefication_config(replace(moe_args, splitter=splitter, router=router), training_args.seed)
    cells = []
    for seed in grid.seeds:
        ours = copy.deepcopy(training_args)
        ours.seed, ours.output_dir = seed, f"{training_args.output_dir}_sweep/seed_{seed}"
        run = begin(model_args, data_args, moe_args, ours)
        held_out = run.held_out(grid.eval_rows)
        dense = train_dense(run, partial(make_model, run, model_args), model_args.activation)
        calibration = Calibration(run, dense)
        for splitter in grid.splitters:
            for position, router in enumerate(grid.routers):
                cell = replace(
                    moe_args, splitter=splitter, router=router, controls=[] if position else moe_args.controls
                )
                name = f"{splitter}-{router}" + ("" if grid.eval_rows is None else f"-{grid.eval_rows}")
                found = run.stages.run(f"{name}.json", partial(measure, calibration, cell, held_out))
                cells += [{"seed": seed, "splitter": splitter, **row} for row in rows_of(found, router, position)]
        calibration.close()
    Path(grid.facts).parent.mkdir(parents=True, exist_ok=True)
    command = "python recipes/sweep.py " + " ".join(sys.argv[1:])
    write_json(
        Path(grid.facts),
        {
            "command": command,
            "model": model_args.model_name_or_path,
            "dataset": data_args.dataset_name,
            "eval_rows": len(held_out.rows),
            "autocast": training_args.mixed_precision,
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
            "rows": average(cells),
        },
    )
    print(tables(json.loads(Path(grid.facts).read_text())))


class Calibration:
    """The profile of one dense model, made when it is first needed and shared by all its conversions."""

    def __init__(self, run: Run, dense: Path):
        self.run, self.dense = run, dense
        self.found: ModelProfile | None = None

    def get(self) -> ModelProfile:
        if self.found is None:
            model, tokens = self.run.load(self.dense), self.run.moe_args.calibration_tokens
            self.found = profile(model, self.run.calibration(), max_tokens=tokens)
        return self.found

    def close(self) -> None:
        if self.found is not None:
            self.found.close()


def measure(calibration: Calibration, cell: MoeficationArguments, held_out: Iterable, path: Path) -> None:
    """Convert in one way and sweep it, under autocast where training was."""
    run = calibration.run
    print(f"seed {run.config.seed}: {cell.splitter} split, {cell.router} router", flush=True)
    model = run.load(calibration.dense)
    with run.autocast():
        report = moefy_(model, moefication_config(cell, run.config.seed), calibration.get())
        found = evaluate(model, held_out, cell.shares, controls=cell.controls, allocations=swept(cell))
    found.facts["conversion"] = report.to_dict()
    found.save(path)


def rows_of(path: Path, router: str, position: int) -> list[dict]:
    """A cell's rows under the router's name; the dense row and the controls once per split."""
    rows = json.loads(path.read_text())["rows"]
    return [
        {**row, "router": own_name(router) if row["router"] == "own" else row["router"]}
        for row in rows
        if row["router"] == "own" or not position
    ]


if __name__ == "__main__":
    main()
