"""The house: which room may use which, and what an import costs."""

import ast
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

import moefy_hf
import moefy_hf.hub

PACKAGE = Path(moefy_hf.__file__).parent
FLOORS = [  # from the ground up: a room uses those below it
    {"modeling"},  # which travels with checkpoints
    {"errors"},
    {"arguments", "discovery"},
    {"data", "io", "loading"},
    {"measure", "runtime"},
    {"analysis", "exporters", "splitters"},
    {"config"},
    {"conversion"},
    {"evaluation", "training"},
    {"hub"},
    {"bench"},
    {"planning"},
    {"recipes"},
    {"cli"},
]
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
ALIASES = {"execution"}  # what older checkpoints' code asks for by name


def imports() -> dict[str, list[tuple[str, str]]]:
    """Module of this package -> the (module it imports, line) of this package."""
    found = defaultdict(list)
    for path in PACKAGE.rglob("*.py"):
        parts = ["moefy_hf", *path.relative_to(PACKAGE).with_suffix("").parts]
        package = parts[:-1]
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                base = package[: len(package) - node.level + 1] if node.level else []
                target = [*base, *(node.module.split(".") if node.module else [])]
                if target[:1] == ["moefy_hf"]:
                    whole = [".".join([*target, alias.name]) for alias in node.names]
                    paths = {name: PACKAGE.parent / Path(*name.split(".")) for name in whole}
                    known = [
                        name
                        for name, path in paths.items()
                        if path.with_suffix(".py").exists() or (path / "__init__.py").exists()
                    ]
                    for name in known or [".".join(target)]:
                        found[".".join(parts)].append((name, f"{path.relative_to(PACKAGE)}:{node.lineno}"))
    return found


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def test_every_room_has_its_floor():
    rooms = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert rooms - {"__init__"} == {*FLOOR, *ALIASES}
    assert len([*PACKAGE.glob("*.py")]) <= 8


def test_no_room_uses_one_above_it():
    climbs = [
        f"{where} uses {target}"
        for module, targets in imports().items()
        if room(module) in FLOOR
        for target, where in targets
        if room(target) != room(module) and FLOOR.get(room(target), 99) >= FLOOR[room(module)]
    ]
    assert not climbs, "\n".join(climbs)


def test_rooms_do_not_go_in_circles():
    uses = defaultdict(set)
    for module, targets in imports().items():
        uses[room(module)] |= {room(target) for target, _ in targets} - {room(module), ""}
    done: set[str] = set()
    while left := [each for each in uses if each not in done]:
        free = [each for each in left if uses[each] <= done | {other for other in uses[each] if other not in uses}]
        assert free, f"a circle among {', '.join(sorted(left))}"
        done |= {*free}


def test_only_what_reads_data_imports_data_sets_and_metrics():
    """Loading them takes seconds, and what converts a model needs batches only."""
    users = defaultdict(set)
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            for name in names:
                users[name.split(".")[0]].add(path.relative_to(PACKAGE).parts[0])
    assert users["datasets"] == {"data", "recipes"} and users["evaluate"] == {"recipes"}


HEAVY = ("peft", "scipy", "sklearn", "matplotlib", "plotly", "transformers.models.mixtral", "onnx", "trl", "evaluate")
HEAVY = (*HEAVY, "datasets", "pandas")
COSTS = {  # what runs -> what must not have been imported for it, and what everybody who runs it has imported anyway
    "import moefy_hf": (("torch", "transformers", *HEAVY), ""),
    "from moefy_hf.cli.main import parser; parser(['--help'])": (("torch", "transformers", *HEAVY), ""),
    "from moefy_hf import moefy_, evaluate, load": (HEAVY, "from transformers import PreTrainedModel"),
    "from moefy_hf import MoEficationCallback": (HEAVY, "from transformers import Trainer"),
}


def imported(code: str, after: str, names: tuple[str, ...]) -> set[str]:
    """Which of these modules code imports that `after` has not imported before it."""
    found = f"{{name for name in {names!r} if name in sys.modules}}"
    program = f"import sys\n{after}\nbefore = {found}\n{code}\nprint(*({found} - before))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=PACKAGE.parent)
    assert done.returncode == 0, done.stderr
    return {*done.stdout.split()}


@pytest.mark.parametrize("code", COSTS)
def test_imports_cost_only_what_is_used(code):
    """By modules, not by seconds."""
    names, anyway = COSTS[code]
    assert not imported(code, anyway, names)


def test_public_names_of_the_hub_are_found_when_asked_for():
    package = moefy_hf.hub
    for name in package.__all__:
        public = getattr(package, name)
        assert public.__module__.startswith("moefy_hf.") and public.__name__ == name
    assert set(package.__all__) <= set(dir(package))
    with pytest.raises(AttributeError, match="no attribute 'moefy'"):
        package.moefy  # noqa: B018


ROOT = PACKAGE.parent
CODE = [*PACKAGE.rglob("*.py"), *(ROOT / "recipes").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]


def test_no_file_is_over_300_lines():
    lines = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in CODE}
    assert not {path: count for path, count in lines.items() if count > 300}
    scripts = {path.name: len(path.read_text().splitlines()) for path in (ROOT / "recipes").glob("*.py")}
    assert scripts and not {name: count for name, count in scripts.items() if count > 200}


def test_no_function_is_over_60_lines():
    functions = {
        f"{path.relative_to(ROOT)}: {node.name}": node.end_lineno - node.lineno + 1
        for path in CODE
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef)
    }
    assert not {name: count for name, count in functions.items() if count > 60}


def test_only_the_section_knows_its_keys():
    """`config.moefication` is read and written by `Section` alone."""
    raw = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in PACKAGE.rglob("*.py")
        if path.name != "section.py"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Subscript | ast.Attribute)
        and isinstance(node.value, ast.Attribute)
        and node.value.attr == "moefication"
    ]
    assert not raw


def test_the_floors_are_those_that_contributors_read():
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = [line.split("|")[1:3] for line in page.splitlines() if line.startswith("| ") and "`" in line]
    floors = {
        int(floor): {*rooms.replace("`", "").replace(" ", "").split(",")}
        for floor, rooms in rows
        if floor.strip().isdigit()
    }
    assert floors == {number: rooms for number, rooms in enumerate(FLOORS, start=1)}
