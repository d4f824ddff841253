"""What tables call classes, as class ids of a model."""

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedConfig

from ..errors import MoefyError
from .texts import say


class Classes:
    """The class ids that the labels of a table stand for.

    Args:
        config: of the model.
        path: what the table is called.
        columns: of the table: name -> feature.
        column: of the labels.
    """

    def __init__(self, config: PreTrainedConfig, path: str, columns: Mapping[str, Any], column: str):
        self.path = path
        self.ids = class_ids(config, getattr(columns[column], "names", None), path)
        self.known = ", ".join(map(str, (config.id2label or {}).values()))

    def of(self, number: int, label: Any) -> int:
        """Return the class id of the row of this number, from 1.

        Raises:
            MoefyError: it has no label, or one that the model does not have.
        """
        label = spelled(label)
        if not label:
            raise MoefyError(f"{self.path}: row {number} has no label")
        if label not in self.ids:
            raise MoefyError(f"{self.path}: row {number} has label {label!r}, which is none of {self.known}")
        return self.ids[label]


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
