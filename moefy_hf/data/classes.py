"""What tables call classes, as class ids of a model."""

from typing import Any

from transformers import PreTrainedConfig

from .texts import say


def class_ids(config: PreTrainedConfig, names: list[str] | None, table: str) -> dict[str, int]:
    """Return what a table may call a class -> the model's class id.

    Where the table knows the names of its classes, its labels are numbers: of the model's class of the same name, and
    where the names differ of the class with that number. Other tables have the model's names or its class ids.

    Args:
        config: of the model.
        names: of the table's classes, if it knows them.
        table: what it is called.
    """
    known = {int(i): str(name) for i, name in (config.id2label or {}).items()}
    if names is None:
        return {str(i): i for i in known} | {name: i for i, name in known.items()}
    by_name = {name.casefold(): i for i, name in known.items()}
    if {name.casefold() for name in names} <= by_name.keys():
        return {str(position): by_name[name.casefold()] for position, name in enumerate(names)}
    if any(name != f"LABEL_{i}" for i, name in known.items()):
        say(f"{table}: classes {', '.join(names)} are by number the model's {', '.join(known.values())}")
    return {str(position): position for position in range(len(names)) if position in known}


def spelled(label: Any) -> str:
    """Return a label as text: "1" of 1, 1.0 and true; empty where there is none, for which datasets write -1."""
    if label is None or label == -1:
        return ""
    whole = isinstance(label, bool) or isinstance(label, float) and label.is_integer()
    return str(int(label) if whole else label).strip()
