"""Compare splits, routers and sizes of experts on a language model at the same FLOPs, without training.

    python recipes/prose_grid.py --config recipes/configs/smollm2/moefication.yaml --output_dir outputs/smollm2_grid \\
        --expert_sizes 4 8 16 32 --routers linear analytic --facts facts.json

For every seed the model is profiled once, split in every way, and every router is fitted on every split. Each is swept
at the shares of experts with which it, the router included, has each budget of the FFNs' FLOPs; beside the first
router of a split stand the controls, at its shares. All routers have the same --router_settings. Finished cells are
not computed again. FACTS gets every figure in the form of prose_facts.py, which prints them:

    python recipes/prose_facts.py facts.json
"""

import copy
import json
import sys
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from common import MoeficationArguments, parse
from moefy_causal_lm import CausalModelArguments, begin, save_dense
from prose import ProseArguments
from prose_facts import COMMON, METHOD, average, nearest, tables
from run import CONVERSION, RECOVERY, SWEEP, moefication_config, router_settings
from stages import write_json
from sweep import Calibration
from transformers import PreTrainedModel, TrainingArguments

from moefy_hf import evaluate, moefy_, reroute_
from moefy_hf.evaluation.search import share_within
from moefy_hf.modeling.ffn_sites import find_sites

ROUTERLESS = (*CONVERSION, *RECOVERY, *SWEEP, "export", "generated_rows", "generated_tokens")
UNNAMED = ("router_settings", "calibration_tokens")  # a cell's name says how else it was converted
UNUSED = {"dense": ROUTERLESS, "*-*.json": tuple(name for name in ROUTERLESS if name not in UNNAMED)}
REFUSED = {
    "num_experts": "the sizes of a grid's experts are its expert_sizes",
    "compensation": "means are those of one router, and a grid compares several",
}
LOCAL = 512  # tokens that each layer's output error is measured on


@dataclass
class GridArguments:
    """The grid."""

    facts: str = field(metadata={"help": "JSON file that gets the figures"})
    seeds: list[int] = field(default_factory=lambda: [0], metadata={"help": "seeds of texts, splits and routers"})
    expert_sizes: list[int] = field(default_factory=lambda: [4, 8, 16, 32], metadata={"help": "neurons per expert"})
    splitters: list[str] = field(
        default_factory=lambda: ["output_aware", "random"], metadata={"help": "splits to compare"}
    )
    routers: list[str] = field(default_factory=lambda: ["linear"], metadata={"help": "routers to compare"})
    budgets: list[float] = field(
        default_factory=lambda: [0.25, 0.5, 0.75, 0.9],
        metadata={"help": "shares of the FFNs' FLOPs, router included, that all are compared at"},
    )


def main() -> None:
    model_args, data_args, moe_args, training_args, grid = parse(
        (CausalModelArguments, ProseArguments, MoeficationArguments, TrainingArguments, GridArguments), __doc__
    )
    check(grid, moe_args)
    moe_args.allocation = "uniform"
    moe_args.controls = [name for name in moe_args.controls if name != "none"]
    cells = [
        replace(moe_args, splitter=splitter, expert_size=size, router=router)
        for size in grid.expert_sizes
        for splitter in grid.splitters
        for router in grid.routers
    ]
    configs = [moefication_config(cell, training_args.seed) for cell in cells]
    rows: list[dict[str, Any]] = []
    for seed in grid.seeds:
        ours = copy.deepcopy(training_args)
        ours.seed, ours.output_dir = seed, f"{training_args.output_dir}/seed_{seed}"
        run = begin(model_args, data_args, copy.deepcopy(cells[0]), ours, UNUSED)
        dense = run.stages.run("dense", partial(save_dense, run, model_args, configs=configs))
        calibration = Calibration(run, dense)
        split: dict[str, PreTrainedModel] = {}  # the model as the last cell left it, by its split
        for cell in cells:
            found = run.stages.run(name_of(cell, grid), partial(measure, calibration, cell, grid, split))
            rows += cells_of(found, cell, seed)
        calibration.close()
    first = json.loads(found.read_text())
    facts = {
        "command": "python recipes/prose_grid.py " + " ".join(sys.argv[1:]),
        **{name: run.stages.settings[name] for name in COMMON},
        "positions": first["facts"]["positions"],
        "dense": first["rows"][0]["perplexity"],
        "texts": {},
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "perplexities": average(rows),
    }
    Path(grid.facts).parent.mkdir(parents=True, exist_ok=True)
    write_json(Path(grid.facts), facts)
    print(tables(facts))


def check(grid: GridArguments, moe_args: MoeficationArguments) -> None:
    for budget in grid.budgets:
        if not 0 < budget <= 1:
            raise ValueError(f"budgets are shares of the FFNs' FLOPs in (0, 1], got {budget}")
    for name, reason in REFUSED.items():
        if value := getattr(moe_args, name):
            raise ValueError(f"{name}={value}: {reason}")


def way_of(cell: MoeficationArguments) -> str:
    """How a cell is split."""
    return f"{cell.splitter}-{cell.expert_size}" + (f"-{cell.shared_experts}-shared" if cell.shared_experts else "")


def name_of(cell: MoeficationArguments, grid: GridArguments) -> str:
    return f"{way_of(cell)}-{cell.router}-{','.join(f'{budget:g}' for budget in grid.budgets)}.json"


def measure(
    calibration: Calibration,
    cell: MoeficationArguments,
    grid: GridArguments,
    split: dict[str, PreTrainedModel],
    path: Path,
) -> None:
    """Put a router on a split, which is made where the cell before had another, and sweep it."""
    run: Any = calibration.run
    way, controls = way_of(cell), cell.controls if cell.router == grid.routers[0] else []
    print(f"{way} neurons, {cell.router} router, seed {run.config.seed}", flush=True)
    with run.autocast():
        if way not in split:
            split.clear()
            split[way] = run.load(calibration.dense)
            moefy_(split[way], moefication_config(cell, run.config.seed), calibration.get())
        else:
            settings = router_settings(cell)
            reroute_(split[way], cell.router, calibration.get(), settings=settings, seed=run.config.seed)
        model = split[way]
        shares = [share for budget in grid.budgets if (share := nearest_share(model, budget)) is not None]
        held_out = run.held_out()
        found = evaluate(model, held_out, shares, controls=controls, allocations=["uniform"], local_tokens=LOCAL)
    found.save(path)


def nearest_share(model: PreTrainedModel, budget: float) -> float | None:
    """The share of experts whose FLOPs, with the router's, do not pass the budget by more than half an expert; None
    where the router and one expert do."""
    half = 0.5 / find_sites(model)[0].act.num_experts
    try:
        return share_within(model, min(1.0, budget + half))
    except ValueError:
        return None


def cells_of(path: Path, cell: MoeficationArguments, seed: int) -> list[dict[str, Any]]:
    names = ("router", "type", "allocation", "k", "ffn_flops", "relative_quality", "output_error")
    same: dict[str, Any] = {"seed": seed, "method": {name: getattr(cell, name) for name in METHOD}, "texts": {}}
    rows = json.loads(path.read_text())["rows"][1:]
    budgets = {row["k"]: nearest(row) for row in rows if row["router"] == "own"}  # controls stand beside the router
    return [{**{name: row[name] for name in names}, **same, "budget": budgets[row["k"]]} for row in rows]


if __name__ == "__main__":
    main()
