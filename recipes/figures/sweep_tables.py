"""Figures of sweep.py: averages over seeds, Markdown tables of them, and a picture.

python recipes/figures/sweep_tables.py facts.json
python recipes/figures/sweep_tables.py facts.json relative_quality output_error
python recipes/figures/sweep_tables.py facts.json --plot facts.png
"""

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from statistics import mean, stdev

from moefy_hf import Sweep

# figure -> its title in a table; all are shown in percent
FIGURES = {
    "relative_quality": "Accuracy relative to dense",
    "accuracy": "Accuracy",
    "agreement": "Agreement with the dense predictions",
    "output_error": "Squared error of the FFN's output relative to it, mean of layers",
    "captured_mass": "Captured activation mass, mean of layers",
}
AVERAGED = (*FIGURES, "loss", "kl", "chunk_share", "ffn_flops", "model_flops", "experts")
BUDGETS = {  # allocation -> what budgets by it are called, in the order of a cell
    "uniform": "uniform budgets",
    "sensitivity": "budgets by sensitivity",
    "angular": "budgets by angular distance",
    "learned": "budgets as learned",
}
TRAINED_ON = "dense, trained on"  # the control of recovery
DENSE = ("dense", TRAINED_ON)
CONTROL_NAMES = {"oracle": "*oracle*", "random": "*random*"}


def own_name(router: str) -> str:
    """A converted model's router, told from the control that draws experts anew for every token."""
    return "fixed random" if router == "random" else router


def average(cells: list[dict]) -> list[dict]:
    """Mean over seeds of every (split, router, allocation, share), and the standard deviation of each figure. A share
    that nobody has set is what was computed."""
    groups: dict[tuple, list[dict]] = {}
    for cell in cells:
        key = (cell["splitter"], cell["router"], cell.get("allocation", ""), cell.get("k"))
        groups.setdefault(key, []).append(cell)
    rows = []
    for (splitter, router, allocation, share), found in groups.items():
        share = mean(cell.get("experts", 1.0) for cell in found) if share is None else share
        row = {"splitter": splitter, "router": router, "allocation": allocation, "share": share}
        row["seeds"] = [cell["seed"] for cell in found]
        for name in AVERAGED:
            values = [cell[name] for cell in found if name in cell]
            if values:
                row[name] = mean(values)
            if len(values) > 1:
                row[f"{name}_sd"] = stdev(values)
        rows.append(row)
    return rows


def tables(facts: dict, figures: Iterable[str] = tuple(FIGURES)) -> str:
    """Markdown: for each figure, a line per split and router, a column per share, cells with all budgets."""
    rows = facts["rows"]
    dense = next(row for row in rows if row["router"] == "dense")
    shares = sorted({row["share"] for row in rows if row["router"] not in DENSE})
    found = {(row["splitter"], row["router"], row["share"], row["allocation"]): row for row in rows}
    lines = list(dict.fromkeys(key[:2] for key in found if key[1] not in DENSE))
    allocations = [name for name in BUDGETS if any(row["allocation"] == name for row in rows)]
    splitters = [splitter for splitter, _ in lines]
    lines.sort(key=lambda line: (splitters.index(line[0]), line[1] in CONTROL_NAMES))  # controls below the methods

    def cell(figure: str, *key) -> str:
        row = found.get(key, {})
        if figure not in row:
            return ""
        spread = f" ± {100 * row[figure + '_sd']:.1f}" if figure + "_sd" in row else ""
        return f"{100 * row[figure]:.1f}{spread}"

    several = len(dense["seeds"]) > 1
    spread = "mean ± standard deviation" if several else "one run"
    text = [
        f"{facts['dataset']}, {facts['eval_rows']:,} {facts.get('unit', 'rows')}: dense accuracy "
        f"{cell('accuracy', *dense_key(dense))} %; seeds {', '.join(map(str, dense['seeds']))}, {spread}."
    ]
    for row in rows:
        if row["router"] == TRAINED_ON:
            accuracy = cell("accuracy", *dense_key(row))
            text[0] += f" The dense model, trained for as many steps as recovery: {accuracy} %."
    if "generated" in facts:
        text += ["", "Exactly generated targets, %:", "", "| model | |", "|---|---|"]
        text += [f"| {name} | {100 * share:.1f} |" for name, share in facts["generated"].items()]
    for figure in figures:
        text += ["", f"{FIGURES[figure]}, %, {' / '.join(BUDGETS[name] for name in allocations)}:", ""]
        text.append("| split | router | " + " | ".join(f"{share:.0%}" for share in shares) + " |")
        text.append("|---" * (2 + len(shares)) + "|")
        for splitter, router in lines:
            pairs = [
                " / ".join(filter(None, (cell(figure, splitter, router, share, each) for each in allocations)))
                for share in shares
            ]
            text.append(f"| {splitter} | {CONTROL_NAMES.get(router, router)} | " + " | ".join(pairs) + " |")
    return "\n".join(text)


def dense_key(row: dict) -> tuple:
    return row["splitter"], row["router"], row["share"], row["allocation"]


def plot(facts: dict, path: str) -> None:
    """Accuracy against FFN FLOPs, means over seeds, of facts with one split and one router beside the controls."""
    routers = list(
        dict.fromkeys(row["router"] for row in facts["rows"] if row["router"] not in {*DENSE, *CONTROL_NAMES})
    )
    if len(routers) != 1:
        sys.exit(f"--plot draws one router beside the controls; these facts have {', '.join(routers)}")
    router = routers[0]
    rows = [{**row, "router": "own" if row["router"] == router else row["router"]} for row in facts["rows"]]
    Sweep(rows, {"quality": "accuracy", "router": router}).plot(path)


def main() -> None:
    if sys.argv[2:3] == ["--plot"] and len(sys.argv) == 4:
        return plot(json.loads(Path(sys.argv[1]).read_text()), sys.argv[3])
    if len(sys.argv) < 2 or "--help" in sys.argv or set(sys.argv[2:]) - set(FIGURES):
        sys.exit(f"{__doc__}\nfigures: {', '.join(FIGURES)} (all by default)")
    print(tables(json.loads(Path(sys.argv[1]).read_text()), sys.argv[2:] or FIGURES))


if __name__ == "__main__":
    main()
