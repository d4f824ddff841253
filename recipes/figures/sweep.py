"""Compare splits and routers on one task: quality against compute, over seeds, without training after conversion.

    python recipes/figures/sweep.py --config recipes/configs/minilm_movie/moefication.yaml --seeds 0 1 2 \\
        --facts facts.json

For every seed the dense model is fine-tuned as `moefy train classification` does (or found finished), profiled once,
and converted with every split; every router is fitted on every split. Finished cells are not computed again. FACTS
gets every figure, averaged over seeds; sweep_tables.py prints them.
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
from sweep_tables import average, own_name, tables
from transformers import TrainingArguments

from moefy_hf import MoEficationConfig, evaluate, moefy_, profile
from moefy_hf.measure.profile import ModelProfile
from moefy_hf.recipes.arguments import ControlArguments, EvaluationArguments
from moefy_hf.recipes.plans import training_plan
from moefy_hf.recipes.run import Run
from moefy_hf.recipes.settings import Arguments, checking, parse
from moefy_hf.recipes.stages import Stage, write_json
from moefy_hf.recipes.steps import compared
from moefy_hf.recipes.tasks.base import begin
from moefy_hf.recipes.tasks.classification import TASK
from moefy_hf.recipes.training import fine_tune

CELL = Stage((MoEficationConfig, EvaluationArguments, ControlArguments), after=("dense",))


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
    with checking():
        arguments = parse((*TASK.types, SweepArguments), __doc__)
        grid = arguments[SweepArguments]
        cells = [(splitter, router) for splitter in grid.splitters for router in grid.routers]
        configs = [
            replace(arguments[MoEficationConfig], splitter=splitter, router=router) for splitter, router in cells
        ]
    rows: list[dict] = []
    for seed in grid.seeds:
        with checking():
            run = begin_seed(arguments, seed)
        fine_tune(run, partial(TASK.make, run))
        held_out = run.held_out(grid.eval_rows)
        calibration = Calibration(run)
        for config in configs:
            own = arguments.replaced(replace(config, seed=seed), run.training)
            name = f"{config.splitter}-{config.router}" + ("" if grid.eval_rows is None else f"-{grid.eval_rows}")
            with checking():
                run.stages.add(f"{name}.json", CELL, own)
            first = config.router == grid.routers[0]
            controls = run.arguments[ControlArguments].controls if first else []
            make = partial(measure, calibration, own[MoEficationConfig], held_out, controls)
            found = run.stages.run(f"{name}.json", make)
            rows += [
                {"seed": seed, "splitter": config.splitter, **row} for row in rows_of(found, config.router, first)
            ]
        calibration.close()
    Path(grid.facts).parent.mkdir(parents=True, exist_ok=True)
    write_json(Path(grid.facts), facts_of(run, len(held_out.rows), rows))
    print(tables(json.loads(Path(grid.facts).read_text())))


def begin_seed(arguments: Arguments, seed: int) -> Run:
    """Begin the run of one seed, in a folder of its own."""
    training = copy.deepcopy(arguments[TrainingArguments])
    training.seed, training.output_dir = seed, f"{training.output_dir}_sweep/seed_{seed}"
    own = arguments.replaced(training, replace(arguments[MoEficationConfig], seed=seed))
    return begin(TASK, own, {"dense": training_plan(own)["dense"]})


def facts_of(run: Run, eval_rows: int, cells: list[dict]) -> dict:
    """Return what the figures file holds."""
    return {
        "command": "python recipes/figures/sweep.py " + " ".join(sys.argv[1:]),
        "model": run.arguments.model.model_name_or_path,
        "dataset": run.arguments.data.dataset_name,
        "eval_rows": eval_rows,
        "autocast": run.training.mixed_precision,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "rows": average(cells),
    }


class Calibration:
    """The profile of a run's dense model, made when it is first needed and shared by all its conversions."""

    def __init__(self, run: Run):
        self.run = run
        self.profile: ModelProfile | None = None

    def get(self) -> ModelProfile:
        if self.profile is None:
            model = self.run.load("dense")
            self.profile = profile(model, self.run.calibration(), max_tokens=self.run.config.calibration_tokens)
        return self.profile

    def close(self) -> None:
        if self.profile is not None:
            self.profile.close()


def measure(
    calibration: Calibration, config: MoEficationConfig, held_out: Iterable, controls: list[str], path: Path
) -> None:
    """Convert in one way and sweep it, under autocast where training was."""
    run = calibration.run
    print(f"seed {config.seed}: {config.splitter} split, {config.router} router", flush=True)
    model = run.load("dense")
    with run.autocast():
        report = moefy_(model, config, calibration.get())
        found = evaluate(model, held_out, run.evaluation.budgets, controls=controls, allocations=compared(run))
    found.facts["conversion"] = report.to_dict()
    found.save(path)


def rows_of(path: Path, router: str, first: bool) -> list[dict]:
    """Return a cell's rows under the router's name; the dense row and the controls once per split."""
    rows = json.loads(path.read_text())["rows"]
    return [
        {**row, "router": own_name(router) if row["router"] == "own" else row["router"]}
        for row in rows
        if row["router"] == "own" or first
    ]


if __name__ == "__main__":
    main()
