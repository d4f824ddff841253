"""Blocks that describe the code: methods, architectures, command line, Python interface."""

import contextlib
import csv
import io
import os
from collections.abc import Mapping
from pathlib import Path
from unittest import mock

from documents import table

import moefy_hf
from moefy_hf.cli.main import COMMANDS
from moefy_hf.cli.main import main as moefy
from moefy_hf.evaluation.controls import BASELINES, CONTROLS
from moefy_hf.modeling.budget_allocation import ALLOCATIONS
from moefy_hf.modeling.routers import ROUTERS
from moefy_hf.modeling.selection import SELECTIONS
from moefy_hf.planning.candidates import CANDIDATES, RELU
from moefy_hf.splitters import SPLITTERS
from moefy_hf.training.schedule import SCHEDULES
from moefy_hf.training.sparsity import PENALTIES

ROOT = Path(__file__).parent.parent
METHODS = ROOT / "docs" / "methods.csv"

# kind of method -> (its names, how one of them is asked for)
KINDS = {
    "splitter": ([*SPLITTERS], 'MoEficationConfig(splitter="{}")'),
    "router": ([*ROUTERS], 'MoEficationConfig(router="{}")'),
    "selection": ([*SELECTIONS], 'MoEficationConfig(selection="{}")'),
    "allocation": ([*ALLOCATIONS], 'MoEficationConfig(allocation="{}")'),
    "schedule": ([*SCHEDULES], 'MoEficationCallback(config, schedule="{}")'),
    "penalty": ([*PENALTIES], 'SparsityPenaltyCallback("{}")'),
    "control": ([*CONTROLS, *BASELINES], 'evaluate(..., controls=["{}"])'),
}


# kind of method -> the class or function of each
HOMES = {
    "splitter": {name: splitter.order for name, splitter in SPLITTERS.items()},
    "router": ROUTERS,
    "selection": SELECTIONS,
    "penalty": PENALTIES,
}


def described(kind: str) -> dict[str, Mapping[str, str]]:
    """Return what docs/methods.csv says of every method of a kind, in the order of its registry.

    Raises:
        KeyError: a method of the registry has no row.
    """
    with METHODS.open(newline="", encoding="utf-8") as file:
        rows = {row["name"]: row for row in csv.DictReader(file) if row["kind"] == kind}
    return {name: rows[name] for name in KINDS[kind][0]}


def methods(kind: str) -> str:
    """A table of the methods of a kind: name, what it does, paper, class or function."""
    homes = HOMES.get(kind)
    head = ["name", "what it does", "paper", *(["in the code"] if homes else [])]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for name, row in described(kind).items():
        home = [f"`{homes[name].__module__}.{homes[name].__qualname__}`"] if homes else []
        cells = [f"`{name}`", row["does"].replace("|", "\\|"), row["paper"], *home]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def choices(kind: str) -> str:
    """A table of the methods of a kind, for users: name and what it does."""
    cells = ((name, row["does"].replace("|", "\\|")) for name, row in described(kind).items())
    return table({kind: f"`{name}`", "what it does": does} for name, does in cells)


def setting(kind: str) -> str:
    """How a method of a kind is asked for."""
    names, form = KINDS[kind]
    return f"```python\n{form.format(names[0])}\n```"


def help_of(*words: str) -> str:
    """Return what `moefy WORDS --help` prints, 100 columns wide."""
    printed = io.StringIO()
    plain = mock.patch.dict(os.environ, {"COLUMNS": "100", "NO_COLOR": "1"})
    with plain, contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        moefy([*words, "--help"])
    return printed.getvalue().rstrip()


def commands() -> str:
    """Every command of `moefy`, with its settings."""
    return "\n\n".join(f"## moefy {name}\n\n```text\n{help_of(name)}\n```" for name in COMMANDS)


def interface() -> str:
    """The public names, as directives that mkdocstrings replaces by their docstrings."""
    return "\n\n".join(f"::: moefy_hf.{moefy_hf._HOMES[name]}.{name}" for name in moefy_hf.__all__)


def candidates() -> str:
    """What a plan tries, and why."""
    rows = []
    for each in CANDIDATES:
        settings = ", ".join(f"{name} {value}" for name, value in each.settings.items())
        suits = "ReLU" if each.activation == RELU else "GELU, SiLU"
        rows.append({"candidate": f"`{each.name}`", "for": suits, "settings": settings, "why": each.reason})
    return table(rows)


BLOCKS = {function.__name__: function for function in (methods, choices, setting, commands, interface, candidates)}
