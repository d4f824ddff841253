"""Facts of an analysis, for model_cards/facts, out of what `moefy analyze` and `moefy ablate` left.

python recipes/figures/expert_facts.py model_cards/facts/NAME.json REPORT ABLATION.json --commands "moefy analyze ..."
"""

import argparse
import json
from pathlib import Path
from typing import Any

LAYER = ("name", "share", "load_entropy", "dead", "always_on", "active_neurons", "never_active_neurons")


def facts_of(analysis: dict[str, Any], ablation: dict[str, Any], commands: list[str]) -> dict[str, Any]:
    """What is said about the experts, without the experts one by one."""
    return {
        "commands": commands,
        "analysis": {key: value for key, value in analysis["facts"].items() if key != "views"},
        "specialisation": analysis["specialisation"],
        "layers": [
            {name: layer[name] for name in (*LAYER, "alignment_with_next")} | {"topics": topics_of(layer)}
            for layer in analysis["layers"]
        ],
        "super_experts": [
            [number, expert["expert"]]
            for number, layer in enumerate(analysis["layers"])
            for expert in layer["experts"]
            if expert["super"]
        ],
        "removal": {key: ablation[key] for key in ("title", "unit", "whole", "rows", "together")},
    }


def topics_of(layer: dict[str, Any]) -> dict[str, list[list[float]]]:
    """Class -> up to three [expert, times as often] that respond to it most."""
    found: dict[str, list[list[float]]] = {}
    for expert in layer["experts"]:
        for each in expert.get("class", []):
            found.setdefault(each["name"], []).append([expert["expert"], each["times"]])
    return {name: sorted(pairs, key=lambda pair: -pair[1])[:3] for name, pairs in sorted(found.items())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("facts", help="JSON file to write")
    parser.add_argument("report", help="folder that moefy analyze wrote")
    parser.add_argument("ablation", help="JSON file that moefy ablate --together wrote")
    parser.add_argument("--commands", nargs="+", required=True, help="that gave the figures")
    args = parser.parse_args()
    analysis, ablation = (
        json.loads(path.read_text(encoding="utf-8"))
        for path in (Path(args.report, "analysis.json"), Path(args.ablation))
    )
    Path(args.facts).write_text(json.dumps(facts_of(analysis, ablation, args.commands), indent=1) + "\n")


if __name__ == "__main__":
    main()
