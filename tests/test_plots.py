"""Pictures of sweeps."""

import re

import pytest

from moefy_hf import Sweep


def rows(kind: str | None, accuracies: list[float]) -> list[dict]:
    own = {"router": "own", "allocation": "uniform"} | ({} if kind is None else {"type": kind})
    return [own | {"ffn_flops": 0.2 * i, "accuracy": accuracy} for i, accuracy in enumerate(accuracies)]


def test_each_allocation_is_a_line_of_its_own(tmp_path):
    pytest.importorskip("matplotlib")
    dense = {"router": "dense", "experts": 1.0, "ffn_flops": 1.0, "accuracy": 0.9}
    names = ["uniform", "sensitivity", "angular"]
    swept = [{**row, "allocation": name} for name in names for row in rows("top_k", [0.5, 0.8])]
    Sweep([dense, *swept], {"quality": "accuracy", "router": "linear"}).plot(tmp_path / "sweep.svg")
    drawn = (tmp_path / "sweep.svg").read_text()
    assert re.findall(r"<!-- (.* budgets) -->", drawn) == [f"linear, {name} budgets" for name in names]


@pytest.mark.parametrize(
    ("kinds", "lines"),
    [
        (["top_k", "threshold"], ["linear, uniform budgets", "linear, threshold, uniform budgets"]),
        ([None], ["linear, uniform budgets"]),  # facts of old sweeps
    ],
)
def test_each_selection_is_a_line_of_its_own(kinds, lines, tmp_path):
    pytest.importorskip("matplotlib")
    dense = {"router": "dense", "experts": 1.0, "ffn_flops": 1.0, "accuracy": 0.9}
    swept = [row for kind in kinds for row in rows(kind, [0.5, 0.8])]
    Sweep([dense, *swept], {"quality": "accuracy", "router": "linear"}).plot(tmp_path / "sweep.svg")
    drawn = (tmp_path / "sweep.svg").read_text()
    assert re.findall(r"<!-- (.* budgets) -->", drawn) == lines
