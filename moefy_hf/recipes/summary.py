"""The table at the end of a run: every model's quality and time, and where it is."""

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..io import markdown

if TYPE_CHECKING:
    from .run import Run

NAMES = {
    "dense": "dense",
    "moefied": "MoEfied",
    "recovered": "MoEfied, then fine-tuned",
    "control": "dense, fine-tuned for as long",
    "scheduled": "MoEfied while training",
}


def summarise(run: "Run", scores: Mapping[str, Mapping[str, float]], percent: bool = True) -> str:
    """Return a table of all models at all budgets, how times were taken, and where the results are.

    Args:
        scores: "NAME at BUDGET" -> metric -> value, as `scores.score` leaves them.
        percent: metrics are shares.
    """
    path = run.folder / "times.json"
    times = json.loads(path.read_text()) if "times.json" in run.stages.plan else {"milliseconds": {}}
    lines = [table(scores, times["milliseconds"], percent)] if scores or times["milliseconds"] else []
    if times["milliseconds"]:
        where = times["device"]
        lines.append(
            f"\nms: median over {times['batches']} batches of {times['rows']:g} rows, on {where}; all models ran each "
            "batch in turn. Masked: all experts are computed, and those that were not chosen dropped."
        )
    return "\n".join([*lines, "", *places(run)])


def table(scores: Mapping[str, Mapping[str, float]], times: Mapping[str, Any], percent: bool) -> str:
    """Return a Markdown table with a row per model and budget."""
    rows = []
    dense = times.get("dense", {}).get("dense")
    for label in dict.fromkeys([*scores, *times]):
        name, _, budget = label.partition(" at ")
        name, learned, _ = name.partition(" as learned")
        row = {"model": NAMES[name], "experts per token": experts(name, budget, bool(learned))}
        for metric, value in scores.get(label, {}).items():
            row[metric] = f"{100 * value:.1f} %" if percent else f"{value:.2f}"
        if times:
            taken = times.get(label, {})
            fast = taken.get("auto", taken.get("dense"))
            row["ms per batch"] = "" if fast is None else f"{fast:.0f}" if fast >= 10 else f"{fast:.2f}"
            row["speed"] = "" if fast is None else f"{dense / fast:.2f} x dense" if name != "dense" else ""
            masked = taken.get("masked")
            row["ms masked"] = "" if masked is None else f"{masked:.0f}" if masked >= 10 else f"{masked:.2f}"
        rows.append(row)
    columns = dict.fromkeys(column for row in rows for column in row)
    return markdown([{column: row.get(column, "") for column in columns} for row in rows])


def experts(name: str, budget: str, learned: bool) -> str:
    """Say how many experts a row is about."""
    if learned:
        return "as learned"
    return "all" if name in ("dense", "control") else f"{100 * float(budget):g} %"


def places(run: "Run") -> list[str]:
    """Name the results of a run."""
    found = [f"{NAMES[name]} model: {folder}" for name, folder in model_folders(run).items()]
    picture = run.folder / "sweep.png"
    return [*found, f"plot: {picture}"] if picture.exists() else found


def model_folders(run: "Run") -> dict[str, str]:
    """Return where the models of a run are, by their names."""
    return {name: str(run.place(name)) for name in NAMES if name in run.stages.plan}
