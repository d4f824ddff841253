"""Model card data: what is known about a checkpoint, in one file beside its weights.

Each step that makes or measures a checkpoint adds a part.
"""

import json
import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..errors import MoefyError
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
    "benchmarks": "a Benchmarks: scores of lm-eval's tasks",
    "analysis": "what `moefy analyze` found, in short: {'facts': ..., 'specialisation': ..., 'strongest': ...}",
    "pruning": "{'pruned': experts taken out of each layer, 'experts': that each had, 'by': how they were chosen}",
    "speed": "{'hardware': what, 'rows': [{column: figure}, ...]}: measured against dense",
}


def read_facts(folder: str | Path) -> dict[str, Any]:
    """Read the model card data of a checkpoint; return its parts, none where there is no file.

    Args:
        folder: of the checkpoint.

    Example:
        >>> read_facts("my-moe")["base_model"]
        'google-bert/bert-base-uncased'
    """
    path = Path(folder) / FILE
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def add_facts(folder: str | Path, **parts: Any) -> dict[str, Any]:
    """Add parts to the model card data of a checkpoint, in place of those of the same name.

    Args:
        folder: of the checkpoint.
        parts: see `PARTS`. Values are JSON, or have a `to_dict`; a data set may be its name alone; None leaves a part
            as it is.

    Returns:
        all parts that are known now.

    Raises:
        MoefyError: an unknown part (the known ones are named), or a value of another form than PARTS says.

    Example:
        >>> add_facts("my-moe", sweep=evaluate(model, batches), evaluation={"data": "imdb", "split": "test"})
    """
    added = as_json(parts)
    facts = read_facts(folder) | added
    if "conversion" in added or "training" in added:
        facts["versions"] = versions()
    write_whole(Path(folder) / FILE, json.dumps(facts, indent=1))
    return facts


def as_json(parts: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parts that are not None, as they are stored.

    Args:
        parts: as `add_facts` takes them.

    Raises:
        MoefyError: see `add_facts`.
    """
    stored = {}
    for name, value in parts.items():
        if name not in PARTS:
            raise MoefyError(f"unknown part {name!r} of a checkpoint's facts; choose from {', '.join(PARTS)}")
        value = value.to_dict() if hasattr(value, "to_dict") else value
        if name in ("calibration", "evaluation") and isinstance(value, str):
            value = {"data": value}
        if value is not None:
            kind = str if name in ("base_model", "license") else Mapping
            whole = (
                name not in ("sweep", "benchmarks") or isinstance(value, Mapping) and {"rows", "facts"} <= value.keys()
            )
            if not isinstance(value, kind) or not whole:
                raise MoefyError(f"{name} must be {PARTS[name]}; got {value!r:.80}")
            stored[name] = value
    return stored


def versions() -> dict[str, str]:
    """Return the versions of Python and the packages that make a checkpoint."""
    packages = ("moefy-hf", "transformers", "torch")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}
