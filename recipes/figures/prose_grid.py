"""Compare splits, routers and sizes of experts on a language model at the same FLOPs, without training.

    python recipes/figures/prose_grid.py --config recipes/configs/smollm2/moefication.yaml \\
        --output_dir outputs/smollm2_grid --expert_sizes 4 8 16 32 --routers linear analytic --facts facts.json

For every seed the model is profiled once, split in every way, and every router is fitted on every split. Each is swept
at the shares of experts with which it, the router included, has each budget of the FFNs' FLOPs; beside the first
router of a split stand the controls, at its shares. All routers have the same --router_settings. Finished cells are
not computed again. FACTS gets every figure in the form of prose_facts.py, which prints them:

    python recipes/figures/prose_facts.py facts.json
"""

import copy
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from prose_facts import COMMON, METHOD, average, nearest, tables
from sweep import Calibration
from transformers import PreTrainedModel, TrainingArguments

from moefy_hf import MoEficationConfig, evaluate, moefy_, reroute_, share_within
from moefy_hf.modeling.ffn_sites import find_sites
from moefy_hf.recipes.arguments import (
    ControlArguments,
    HeldOutArguments,
    ModelArguments,
    ProseDataArguments,
)
from moefy_hf.recipes.prose import ProseRun
from moefy_hf.recipes.settings import Arguments, checking, parse
from moefy_hf.recipes.stages import Stage, read_made, write_json
from moefy_hf.recipes.tasks.base import begin
from moefy_hf.recipes.tasks.causal_lm import TASK, save_dense

DENSE = {"dense": Stage((ModelArguments,))}
CELL = Stage((ProseDataArguments, HeldOutArguments, MoEficationConfig), after=("dense",), measuring=True)
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
    flops: list[float] = field(
        default_factory=lambda: [0.25, 0.5, 0.75, 0.9],
        metadata={"help": "shares of the FFNs' FLOPs, router included, that all are compared at"},
    )


def main() -> None:
    with checking():
        arguments = parse((*TASK.types, GridArguments), __doc__, first_of=first_cell)
        grid = arguments[GridArguments]
        check(grid, arguments[MoEficationConfig])
        configs = list(configs_of(grid, arguments[MoEficationConfig]))
    rows: list[dict[str, Any]] = []
    for seed in grid.seeds:
        with checking():
            run = begin_seed(arguments, seed)
        run.stages.run("dense", partial(save_dense, run, configs=configs))
        calibration = Calibration(run)
        split: dict[str, PreTrainedModel] = {}  # the model as the last cell left it, by its split
        for config in configs:
            config, name = replace(config, seed=seed), name_of(config, grid)
            with checking():
                run.stages.add(name, CELL, run.arguments.replaced(config))
            found = run.stages.run(name, partial(measure, calibration, config, grid, split))
            rows += cells_of(found, config, seed)
        calibration.close()
    Path(grid.facts).parent.mkdir(parents=True, exist_ok=True)
    facts = facts_of(run, found, rows)
    write_json(Path(grid.facts), facts)
    print(tables(facts))


def check(grid: GridArguments, config: MoEficationConfig) -> None:
    """Find what a grid cannot be of."""
    for budget in grid.flops:
        if not 0 < budget <= 1:
            raise ValueError(f"flops are shares of the FFNs' FLOPs in (0, 1], got {budget}")
    for name, reason in REFUSED.items():
        if value := getattr(config, name):
            raise ValueError(f"{name}={value}: {reason}")


def first_cell(arguments: Arguments) -> dict[str, str]:
    """Return the first router: router_settings need not suit the one that a recipe's file names."""
    return {"router": arguments[GridArguments].routers[0]}


def configs_of(grid: GridArguments, config: MoEficationConfig) -> Iterator[MoEficationConfig]:
    """Return how each cell is converted; budgets are set later."""
    for size in grid.expert_sizes:
        for splitter in grid.splitters:
            for router in grid.routers:
                yield replace(config, splitter=splitter, expert_size=size, router=router, allocation="uniform", k=1.0)


def begin_seed(arguments: Arguments, seed: int) -> ProseRun:
    """Begin the run of one seed, in a folder of its own."""
    training = copy.deepcopy(arguments[TrainingArguments])
    training.seed, training.output_dir = seed, f"{training.output_dir}/seed_{seed}"
    own = arguments.replaced(training, replace(arguments[MoEficationConfig], seed=seed))
    return cast(ProseRun, begin(TASK, own, DENSE))


def facts_of(run: ProseRun, cell: Path, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return what the figures file holds."""
    first, settings = json.loads(cell.read_text()), read_made(run.folder)[cell.name]
    return {
        "command": "python recipes/figures/prose_grid.py " + " ".join(sys.argv[1:]),
        **{name: settings[name] for name in COMMON},
        "positions": first["facts"]["positions"],
        "dense": first["rows"][0]["perplexity"],
        "texts": {},
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "perplexities": average(rows),
    }


def way_of(config: MoEficationConfig) -> str:
    """Say how a cell is split."""
    shared = f"-{config.shared_experts}-shared" if config.shared_experts else ""
    return f"{config.splitter}-{config.expert_size}{shared}"


def name_of(config: MoEficationConfig, grid: GridArguments) -> str:
    return f"{way_of(config)}-{config.router}-{','.join(f'{budget:g}' for budget in grid.flops)}.json"


def measure(
    calibration: Calibration,
    config: MoEficationConfig,
    grid: GridArguments,
    split: dict[str, PreTrainedModel],
    path: Path,
) -> None:
    """Put a router on a split, which is made where the cell before had another, and sweep it."""
    run: Any = calibration.run
    way = way_of(config)
    controls = run.arguments[ControlArguments].controls if config.router == grid.routers[0] else []
    print(f"{way} neurons, {config.router} router, seed {config.seed}", flush=True)
    with run.autocast():
        if way not in split:
            split.clear()
            split[way] = run.load("dense")
            moefy_(split[way], config, calibration.get())
        else:
            settings = config.router_settings
            reroute_(split[way], config.router, calibration.get(), settings=settings, seed=config.seed)
        model = split[way]
        shares = [share for budget in grid.flops if (share := nearest_share(model, budget)) is not None]
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


def cells_of(path: Path, config: MoEficationConfig, seed: int) -> list[dict[str, Any]]:
    names = ("router", "type", "allocation", "k", "ffn_flops", "relative_quality", "output_error")
    same: dict[str, Any] = {"seed": seed, "method": {name: getattr(config, name) for name in METHOD}, "texts": {}}
    rows = json.loads(path.read_text())["rows"][1:]
    budgets = {row["k"]: nearest(row) for row in rows if row["router"] == "own"}  # controls stand beside the router
    return [{**{name: row[name] for name in names}, **same, "budget": budgets[row["k"]]} for row in rows]


if __name__ == "__main__":
    main()
