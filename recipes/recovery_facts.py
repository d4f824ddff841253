"""Figures of recipe runs with recovery, averaged over their seeds, for sweep_tables.py to print.

    for seed in 0 1 2; do
        accelerate launch recipes/moefy_classification.py --config recipes/configs/minilm_movie/moefication.yaml \\
            --recovery_epochs 1 --distillation_weight 1 --seed $seed --output_dir outputs/recovery_$seed
    done
    python recipes/recovery_facts.py facts.json outputs/recovery_0 outputs/recovery_1 outputs/recovery_2

Everything is relative to the dense model that was converted. A line "linear, recovered" is the linear router in the
model fine-tuned after conversion; the dense model trained for as many steps is named above the table.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

import torch
import transformers
from stages import MARKER, write_json
from sweep_tables import TRAINED_ON, average, tables

# settings that are facts about a run but not about where it was
PLACES = ("seed", "data_seed", "redo")


def facts_of(directories: Sequence[Path]) -> dict:
    """Averages over finished runs of one recipe that differ in their seed.

    Raises:
        ValueError: a run is not finished, or they differ in something else.
    """
    settings = [settings_of(directory) for directory in directories]
    common = {key: value for key, value in settings[0].items() if key not in PLACES}
    for directory, each in zip(directories, settings, strict=True):
        differing = sorted(key for key in common if each.get(key) != common[key])
        if differing:
            raise ValueError(f"{directory} differs from {directories[0]} in {', '.join(differing)}")
    cells = [row for directory, each in zip(directories, settings, strict=True) for row in cells_of(directory, each)]
    sweep = json.loads((directories[0] / "sweep.json").read_text())
    facts = {
        "model": common.get("model_name_or_path") or common.get("model_type") or "t5",
        "dataset": common["dataset_name"],
        "eval_rows": sweep["facts"]["positions"],
        "autocast": common["mixed_precision"],
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "settings": common,
        "rows": average(cells),
    }
    generated = [generated_by(directory) for directory in directories]
    if generated[0]:
        facts["generated"] = {name: mean(each[name] for each in generated) for name in generated[0]}
    return facts


def settings_of(directory: Path) -> dict:
    made = json.loads((directory / MARKER).read_text()) if (directory / MARKER).exists() else {}
    missing = [name for name in ("sweep.json", "recovered.json", "control.json") if name not in made]
    if missing:
        raise ValueError(f"{directory} lacks {', '.join(missing)}: is it a finished run with --recovery_epochs?")
    return made["recovered.json"]


def cells_of(directory: Path, settings: dict) -> list[dict]:
    """Rows as sweep.py has them: those before recovery, those after, and the dense model trained on."""
    before, after = (json.loads((directory / f"{name}.json").read_text())["rows"] for name in ("sweep", "recovered"))
    quality = before[0]["accuracy"]
    control = {"router": TRAINED_ON, **json.loads((directory / "control.json").read_text())}
    rows = [row if row["router"] != "own" else row | {"router": settings["router"]} for row in before]
    rows += [row | {"router": f"{settings['router']}, recovered"} for row in after if row["router"] == "own"]
    run = {"seed": settings["seed"], "splitter": settings["splitter"]}
    return [{**row, **run, "relative_quality": row["accuracy"] / quality} for row in [*rows, control]]


def generated_by(directory: Path) -> dict[str, float]:
    """What moefy_seq2seq.py leaves: the share of exactly generated targets, of every model."""
    found = {}
    for path in sorted(directory.glob("generated_*.json")):
        found |= json.loads(path.read_text())
    return found


def main() -> None:
    if len(sys.argv) < 3 or sys.argv[1].startswith("-") or not sys.argv[1].endswith(".json"):
        sys.exit(__doc__)
    facts = {"command": "python recipes/recovery_facts.py " + " ".join(sys.argv[1:])}
    facts |= facts_of([Path(each) for each in sys.argv[2:]])
    Path(sys.argv[1]).parent.mkdir(parents=True, exist_ok=True)
    write_json(Path(sys.argv[1]), facts)
    print(tables(facts))


if __name__ == "__main__":
    main()
