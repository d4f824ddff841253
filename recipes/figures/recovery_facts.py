"""Figures of recipe runs that train a MoEfied model, averaged over their seeds, for sweep_tables.py to print.

    for seed in 0 1 2; do
        accelerate launch recipes/moefy_classification.py --config recipes/configs/minilm_movie/moefication.yaml \\
            --recovery_epochs 1 --distillation_weight 1 --seed $seed --output_dir outputs/recovery_$seed
    done
    python recipes/figures/recovery_facts.py facts.json outputs/recovery_0 outputs/recovery_1 outputs/recovery_2

Accuracies are relative to the dense model that was converted. A line "linear, recovered" is the linear router in the
model fine-tuned after conversion, "linear, anneal" in one that was MoEfied while training (--schedule anneal),
"sigmoid, level, learned" is the selection that a model has learned (--learned_eta), in the column of the share of
experts it computes; the dense model trained for as many steps as recovery is named above the table.
"""

import json
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import torch
import transformers
from sweep_tables import TRAINED_ON, average, own_name, tables

from moefy_hf.recipes.stages import read_made, write_json

# settings in which runs may differ
PLACES = ("seed", "data_seed")
OPTIONAL = ("recovered", "control", "scheduled")


def facts_of(directories: Sequence[Path], models: Collection[str] | None = None) -> dict:
    """Averages over finished runs of one recipe that differ in their seed.

    Args:
        models: of "recovered", "control" and "scheduled", those to read; by default what all the runs have.

    Raises:
        ValueError: a run has none of them, two have one seed, or they differ in something else.
    """
    runs = [made_in(directory) for directory in directories]
    asked = OPTIONAL if models is None else models
    models = [name for name in OPTIONAL if name in asked and all(f"{name}.json" in made for made in runs)]
    if not models:
        raise ValueError(f"{directories[0]} lacks recovered.json or scheduled.json: is it finished?")
    for name in ("sweep.json", *(f"{name}.json" for name in models)):
        for directory, made in zip(directories, runs, strict=True):
            every = {*runs[0][name], *made[name]} - {*PLACES}
            if changed := sorted(key for key in every if runs[0][name].get(key) != made[name].get(key)):
                raise ValueError(f"{directory} differs from {directories[0]} in {', '.join(changed)}")
    settings = [made[f"{models[0]}.json"] for made in runs]
    seeds = [each["seed"] for each in settings]
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"runs must differ in their seed, got {', '.join(map(str, seeds))}")
    common = {key: value for key, value in settings[0].items() if key not in PLACES}
    cells = [
        cell for directory, made in zip(directories, runs, strict=True) for cell in cells_of(directory, made, models)
    ]
    return {
        "model": common.get("model_name_or_path") or common.get("model_type") or "t5",
        "dataset": common["dataset_name"],
        "eval_rows": json.loads((directories[0] / "sweep.json").read_text())["facts"]["positions"],
        "unit": "target tokens" if "target_column" in common else "rows",
        "autocast": common["mixed_precision"],
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "settings": common,
        "rows": average(cells),
    }


def made_in(directory: Path) -> dict[str, dict]:
    """The finished results of a run, and their settings.

    Raises:
        ValueError: there is no sweep.
    """
    made = read_made(directory)
    if "sweep.json" not in made:
        raise ValueError(f"{directory} lacks sweep.json: is it a finished run of a recipe?")
    return made


def cells_of(directory: Path, made: dict[str, dict], models: Collection[str]) -> list[dict]:
    """Rows as sweep.py has them, of the model as it was converted and of those trained."""

    def read(name: str) -> Any:
        return json.loads((directory / f"{name}.json").read_text())

    settings = made["sweep.json"]
    rows = read("sweep")["rows"]
    dense, router = rows[0]["accuracy"], own_name(settings["router"])
    rows = [row | {"router": router_of(row, router)} for row in rows]
    for name in models:
        if name == "control":
            rows.append({"router": TRAINED_ON, **read(name)})
            continue
        how = made[f"{name}.json"]["schedule"] if name == "scheduled" else name
        for row in read(name)["rows"]:
            if row["router"] == "own":
                other = {key: value for key, value in row.items() if key not in OF_ITSELF}
                label = f"{router_of(row, router)}, {how if 'k' in row else 'learned'}"
                rows.append({"allocation": "learned", **other, "router": label})
                rows[-1]["relative_quality"] = row["accuracy"] / dense
    return [{**row, "seed": settings["seed"], "splitter": settings["splitter"]} for row in rows]


def router_of(row: dict[str, Any], own: str) -> str:
    """A row's router by its name, with the selection where that is another than the best k."""
    if row["router"] != "own":
        return row["router"]
    return own if row["type"] == "top_k" else f"{own}, {row['type']}"


# a trained model is compared with itself when all its experts run: that is not the dense model
OF_ITSELF = ("agreement", "kl", "relative_quality")


def generated_by(directory: Path) -> dict[str, float]:
    """Return what `moefy train seq2seq` leaves: the share of exactly generated targets, of every model."""
    scores: dict[str, dict[str, float]] = {}
    for name in made_in(directory):
        if name.startswith("scores_"):
            scores |= json.loads((directory / name).read_text())
    return {who: metrics["exact_match"] for who, metrics in scores.items() if "exact_match" in metrics}


def main() -> None:
    if len(sys.argv) < 3 or sys.argv[1].startswith("-") or not sys.argv[1].endswith(".json"):
        sys.exit(__doc__)
    directories = [Path(each) for each in sys.argv[2:]]
    facts: dict[str, Any] = {"command": "python recipes/figures/recovery_facts.py " + " ".join(sys.argv[1:])}
    try:
        facts |= facts_of(directories)
    except ValueError as error:
        sys.exit(str(error))
    generated = [generated_by(directory) for directory in directories]
    if common := set.intersection(*map(set, generated)):
        names = [name for name in generated[0] if name in common]
        facts["generated"] = {name: mean(each[name] for each in generated) for name in names}
    Path(sys.argv[1]).parent.mkdir(parents=True, exist_ok=True)
    write_json(Path(sys.argv[1]), facts)
    print(tables(facts))


if __name__ == "__main__":
    main()
