"""What is known about a checkpoint: each step that makes or measures it adds a part to one file beside its weights."""

import json
import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..io import write_whole

FILE = "moefication_facts.json"
PARTS = {
    "base_model": "name on the Hub of the dense model that was converted, or what it is",
    "license": "of the base model, which the checkpoint inherits",
    "calibration": "{'data': name}: what splits and routers were fitted on",
    "conversion": "a ConversionReport",
    "prediction": "a QualityCheck: quality right after conversion, on held-out calibration data",
    "training": "{setting: value} of training after conversion",
    "evaluation": "{'data': name, 'split': name}: what the sweep was measured on",
    "sweep": "a Sweep: quality against compute",
    "analysis": "what `moefy analyze` found, in short: {'facts': ..., 'specialisation': ..., 'strongest': ...}",
    "pruning": "{'pruned': experts taken out of each layer, 'experts': that each had, 'by': how they were chosen}",
    "speed": "{'hardware': what, 'rows': [{column: figure}, ...]}: measured against dense",
}


def read_facts(folder: str | Path) -> dict[str, Any]:
    """The parts that are known; empty where there is no file."""
    path = Path(folder) / FILE
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def add_facts(folder: str | Path, **parts: Any) -> dict[str, Any]:
    """Add parts (see PARTS) to a checkpoint's facts, replacing those of the same name; None leaves one as it is.

    Values are JSON, or have a `to_dict`; a data set may be its name alone.

    Returns:
        all that is known now.

    Raises:
        ValueError: an unknown part (the known ones are named), or a value of another form than PARTS says.
    """
    added = as_json(parts)
    found = read_facts(folder) | added
    if "conversion" in added or "training" in added:
        found["versions"] = versions()
    write_whole(Path(folder) / FILE, json.dumps(found, indent=1))
    return found


def as_json(parts: Mapping[str, Any]) -> dict[str, Any]:
    """The parts that are not None, as they are stored.

    Raises:
        ValueError: see `add_facts`.
    """
    found = {}
    for name, value in parts.items():
        if name not in PARTS:
            raise ValueError(f"unknown part {name!r} of a checkpoint's facts; choose from {', '.join(PARTS)}")
        value = value.to_dict() if hasattr(value, "to_dict") else value
        if name in ("calibration", "evaluation") and isinstance(value, str):
            value = {"data": value}
        if value is not None:
            kind = str if name in ("base_model", "license") else Mapping
            if not isinstance(value, kind) or name == "sweep" and not {"rows", "facts"} <= value.keys():
                raise ValueError(f"{name} must be {PARTS[name]}; got {value!r:.80}")
            found[name] = value
    return found


def versions() -> dict[str, str]:
    packages = ("moefy-hf", "transformers", "torch")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}
