"""Figures of moefy_causal_lm.py runs, of several methods and seeds on the same texts, and Markdown tables of them.

    for method in moefication cmoe; do
        accelerate launch recipes/moefy_causal_lm.py --config recipes/configs/smollm2/$method.yaml \\
            --output_dir outputs/smollm2_$method
    done
    python recipes/figures/prose_facts.py facts.json outputs/smollm2_moefication outputs/smollm2_cmoe
    python recipes/figures/prose_facts.py facts.json

Perplexities are relative to the dense model's as it came, also where a run has recovered; means over the seeds of a
method, with standard deviations.
"""

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
import transformers
from recovery_facts import made_in

from moefy_hf.evaluation.controls import BASELINES
from moefy_hf.io import markdown
from moefy_hf.recipes.stages import write_json

# what runs must have in common, and what tells their methods from each other
COMMON = (
    "model_name_or_path",
    "dataset_name",
    "held_out_name",
    "held_out_splits",
    "held_out_tokens",
    "max_seq_length",
)
BUDGETS = (0.25, 0.5, 0.75, 0.9, 1.0)  # shares of the FFNs' FLOPs that methods are compared at
LEARNED = ("learned_eta", "learned_tau")
METHOD = (
    *("splitter", "router", "router_settings", "expert_size", "num_experts", "shared_experts", "compensation"),
    "calibration_tokens",
)


def facts_of(directories: Sequence[Path]) -> dict[str, Any]:
    """
    Raises:
        ValueError: a run is not finished, or not of the same model and texts as the first.
    """
    cells: list[dict[str, Any]] = []
    common: dict[str, Any] = {}
    for directory in directories:
        settings = made_in(directory)["sweep.json"]
        ours = {name: settings[name] for name in COMMON}
        common = common or ours
        if changed := [name for name in COMMON if ours[name] != common[name]]:
            raise ValueError(f"{directory} differs from {directories[0]} in {', '.join(changed)}")
        cells += cells_of(directory, settings) + recovered_cells_of(directory)
    sweep = json.loads((directories[0] / "sweep.json").read_text())
    return {
        **common,
        "positions": sweep["facts"]["positions"],
        "dense": sweep["rows"][0]["perplexity"],
        "texts": json.loads((directories[0] / "prose_dense.json").read_text())["perplexity"],
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "perplexities": average(cells),
    }


def cells_of(directory: Path, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """A row of the sweep each, and, of the model's own router, what each text's perplexity became."""
    sweep = json.loads((directory / "sweep.json").read_text())
    prose = json.loads((directory / "prose_moefied.json").read_text())["perplexity"]
    dense = json.loads((directory / "prose_dense.json").read_text())["perplexity"]
    method = {name: settings.get(name) for name in METHOD}
    found = []
    for row in sweep["rows"][1:]:
        own = row["router"] == "own"
        cell = {name: row[name] for name in ("router", "type", "allocation", "k", "ffn_flops", "relative_quality")}
        texts = {text: prose[f"{text} at {row['k']}"] / dense[text] for text in dense} if own else {}
        if own and (row["allocation"], row["type"]) != (allocation_of(settings), "top_k"):
            texts = {}  # prose is read at the model's own selection
        ours = {} if row["router"] in BASELINES else method
        found.append({**cell, "seed": settings["seed"], "method": ours, "texts": texts})
    return found


def recovered_cells_of(directory: Path) -> list[dict[str, Any]]:
    """The model that was fine-tuned at its budget, at each of them, and the dense one trained for as many steps; both
    relative to the dense model as it came."""
    made = made_in(directory)
    if not {"recovered.json", "prose_recovered.json", "prose_control.json"} <= made.keys():
        return []
    settings = made["recovered.json"]
    method = {name: settings.get(name) for name in METHOD} | {"recovery": recovery_of(settings)}
    dense, recovered, control = (
        json.loads((directory / f"prose_{name}.json").read_text())["perplexity"]
        for name in ("dense", "recovered", "control")
    )
    whole = json.loads((directory / "sweep.json").read_text())["rows"][0]["perplexity"]
    found = []
    for row in json.loads((directory / "recovered.json").read_text())["rows"][1:]:
        row = {"allocation": "learned", "k": None} | row
        cell = {name: row[name] for name in ("router", "type", "allocation", "k", "experts", "ffn_flops")}
        cell |= {"seed": settings["seed"], "method": method, "relative_quality": row["perplexity"] / whole}
        at = "as learned" if row["k"] is None else f"at {row['k']}"
        ours = row["k"] is None or (row["type"], row["allocation"]) == ("top_k", allocation_of(settings))
        found.append(cell | {"texts": {text: recovered[f"{text} {at}"] / dense[text] for text in dense if ours}})
    texts = {text: control[text] / dense[text] for text in dense}  # as many tokens of each
    other = ("share", "distillation_weight", *LEARNED)
    alike = {name: value for name, value in recovery_of(settings).items() if name not in other}
    trained = {"seed": settings["seed"], "method": {"recovery": alike}, "router": "control"}
    trained |= {"type": "top_k", "allocation": "uniform", "k": 1.0, "ffn_flops": 1.0, "texts": texts}
    return [*found, trained | {"relative_quality": math.exp(mean(map(math.log, texts.values())))}]


def recovery_of(settings: dict[str, Any]) -> dict[str, Any]:
    """What a recovery was, as far as figures depend on it."""
    names = ("recovery_parameters", "lora_rank", "distillation_weight", "learning_rate")
    tokens = round(settings["recovery_epochs"] * settings["train_tokens"])
    learned = {name: settings[name] for name in LEARNED if settings.get(name) is not None}
    return {"tokens": tokens, "share": settings["k"], **{name: settings[name] for name in names}, **learned}


def allocation_of(settings: dict[str, Any]) -> str:
    """Return how a run's models shared their budgets: "auto" was by sensitivity."""
    return "sensitivity" if settings["allocation"] == "auto" else settings["allocation"]


def average(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Over seeds; of what several runs have of one seed, the one that was read text by text."""
    groups: dict[str, dict[int, dict[str, Any]]] = {}
    for cell in cells:
        key = json.dumps([cell[name] for name in ("method", "router", "type", "allocation", "k")])
        of_seed = groups.setdefault(key, {})
        if cell["seed"] not in of_seed or cell["texts"]:
            of_seed[cell["seed"]] = cell
    rows = []
    for group in groups.values():
        found = list(group.values())
        row = {name: found[0][name] for name in ("method", "router", "type", "allocation", "k")}
        if row["k"] is None:  # what was learned differs between seeds
            row["k"] = mean(cell["experts"] for cell in found)
        row["seeds"] = sorted(group)
        for name in ("relative_quality", "ffn_flops", "output_error", "budget"):
            if name in found[0]:
                row[name] = mean(cell[name] for cell in found)
        if len(row["seeds"]) > 1:
            row["relative_quality_sd"] = stdev(cell["relative_quality"] for cell in found)
        row["texts"] = {text: mean(cell["texts"][text] for cell in found) for text in found[0]["texts"]}
        rows.append(row)
    return rows


def nearest(row: dict[str, Any]) -> float:
    """The budget that a row belongs to."""
    return row.get("budget") or min(BUDGETS, key=lambda budget: abs(row["ffn_flops"] - budget))


def label(row: dict[str, Any], sized: bool = True) -> str:
    """What a line of a table is about, with or without the size of the experts."""
    method = row["method"]
    recovery = method.get("recovery")
    if row["router"] == "control":
        return f"the dense model, trained on {recovery['tokens']:,} tokens, too"
    if not method:
        return f"*{row['router']}*, of the dense model"
    parts = [f"{method['splitter']} of {size_of(row)}" if sized else method["splitter"]]
    parts += [f"{method['shared_experts']} shared"] if method["shared_experts"] else []
    parts += ["compensated"] if method["compensation"] else []
    set_to = " ".join(["", *written(method.get("router_settings") or [])])
    parts.append(method["router"] + set_to if row["router"] == "own" else f"*{row['router']}*")
    if row["type"] != "top_k":
        parts.append(row["type"])
    if recovery:
        at = "with learned budgets" if "learned_eta" in recovery else f"at {recovery['share']:.0%} of the experts"
        parts.append(f"recovered {at} on {recovery['tokens']:,} tokens")
    return ", ".join(parts) + ("" if row["allocation"] == "uniform" else f", {row['allocation']} budgets")


def written(settings: dict[str, Any] | list[str]) -> list[str]:
    """Return a router's settings as NAME=NUMBER, as older figures have them."""
    return [f"{name}={value}" for name, value in settings.items()] if isinstance(settings, dict) else settings


def size_of(row: dict[str, Any]) -> str:
    """Of the experts that a line is about, if it is about any."""
    method = row["method"]
    if "num_experts" not in method:
        return ""
    return f"{method['expert_size']} neurons" if method["num_experts"] is None else f"1/{method['num_experts']}"


def tables(facts: dict[str, Any]) -> str:
    """Perplexity relative to dense, and the FFNs' FLOPs, near each budget; then each text by itself. Where methods are
    compared with experts of several sizes, a table for each budget."""
    rows, texts = facts["perplexities"], facts["texts"]
    data = facts["held_out_name"] or facts["held_out_splits"]
    known = ", ".join(f"{text} {perplexity:.2f}" for text, perplexity in texts.items())
    known = f" ({known})" if known else ""
    parts = [
        f"{' and '.join(data)}, {facts['positions']:,} tokens: dense perplexity {facts['dense']:.2f}{known}.",
        "Perplexity relative to dense (FFN FLOPs relative to dense, routers included):",
    ]
    sized = {(label(row, sized=False), size_of(row)) for row in rows}
    parts += by_size(rows) if len(sized) > len({name for name, _ in sized}) else [by_budget(rows)]
    if own := [row for row in rows if row["texts"]]:
        lines = [
            {"method": label(row), "share": f"{row['k']:.0%}", **{text: f"{row['texts'][text]:.3f}" for text in texts}}
            for row in own
        ]
        parts += ["Each text, the models' own routers:", markdown(lines)]
    return "\n\n".join(parts)


def by_budget(rows: Sequence[dict[str, Any]]) -> str:
    names = dict.fromkeys(map(label, rows))
    of = {name: [row for row in rows if label(row) == name] for name in names}
    return markdown([{"method": name, **{f"{each:.0%}": shown(of[name], each) for each in BUDGETS}} for name in names])


def by_size(rows: Sequence[dict[str, Any]]) -> list[str]:
    """A table for each budget, a column for each size of the experts."""
    names = dict.fromkeys(label(row, sized=False) for row in rows)
    sizes = dict.fromkeys(map(size_of, rows))
    of: dict[tuple[str, str], list[dict[str, Any]]] = {(name, size): [] for name in names for size in sizes}
    for row in rows:
        of[label(row, sized=False), size_of(row)].append(row)
    tables = []
    for budget in (budget for budget in BUDGETS if any(nearest(row) == budget for row in rows)):
        head = f"{budget:.0%} of the FLOPs, experts of"
        lines = [{head: name, **{size: shown(of[name, size], budget) for size in sizes}} for name in names]
        tables.append(markdown(lines))
    return tables


def shown(rows: Sequence[dict[str, Any]], budget: float) -> str:
    """The one nearest to a budget, if any is nearer to it than to others."""
    ours = [row for row in rows if nearest(row) == budget]
    row = min(ours, key=lambda row: abs(row["ffn_flops"] - budget), default=None)
    if row is None:
        return ""
    spread = f" ± {row['relative_quality_sd']:.3f}" if "relative_quality_sd" in row else ""
    return f"{row['relative_quality']:.3f}{spread} ({row['ffn_flops']:.0%})"


def main() -> None:
    if len(sys.argv) < 2 or not sys.argv[1].endswith(".json"):
        sys.exit(__doc__)
    path = Path(sys.argv[1])
    if len(sys.argv) > 2:
        facts: dict[str, Any] = {"command": "python recipes/figures/prose_facts.py " + " ".join(sys.argv[1:])}
        try:
            facts |= facts_of([Path(each) for each in sys.argv[2:]])
        except ValueError as error:
            sys.exit(str(error))
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, facts)
    print(tables(json.loads(path.read_text())))


if __name__ == "__main__":
    main()
