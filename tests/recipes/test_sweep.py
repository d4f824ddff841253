"""The grid of splits, routers and seeds, end to end on a tiny BERT."""

import json
import sys
from pathlib import Path
from statistics import mean, stdev

import pytest
import sweep
import sweep_tables

GRID = ["--splitters", "random", "coactivation", "--routers", "linear", "similarity", "--controls", "oracle"]
SMALL = {"max_steps": 6, "calibration_tokens": 600}


@pytest.fixture(scope="module")
def grid(recipe, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("grid")
    recipe(folder / "run", *GRID, "--seeds", "0", "1", "--facts", str(folder / "facts.json"), main=sweep.main, **SMALL)
    return folder


def cells(folder: Path, name: str, suffix: str = "") -> list[dict]:
    paths = [folder / "run_sweep" / f"seed_{seed}" / f"{name}{suffix}.json" for seed in (0, 1)]
    return [json.loads(path.read_text()) for path in paths]


def test_facts_are_means_over_the_seeds(grid):
    facts = json.loads((grid / "facts.json").read_text())
    assert facts["eval_rows"] == 48 and "--seeds 0 1" in facts["command"]
    assert {(row["splitter"], row["router"]) for row in facts["rows"]} == {
        (splitter, router)
        for splitter in ("random", "coactivation")
        for router in ("dense", "linear", "similarity", "oracle")
    }
    assert len(facts["rows"]) == 2 * (1 + 3 * 2 * 2)
    for row in facts["rows"]:
        assert row["seeds"] == [0, 1]
        name = f"{row['splitter']}-{'similarity' if row['router'] == 'similarity' else 'linear'}"
        router = row["router"] if row["router"] in ("dense", "oracle") else "own"
        found = [
            each
            for cell in cells(grid, name)
            for each in cell["rows"]
            if (each["router"], each.get("allocation", ""), each.get("k", 1.0))
            == (router, row["allocation"], row["share"])
        ]
        for figure in ("accuracy", "kl", "agreement"):
            values = [each[figure] for each in found]
            assert len(values) == 2
            assert row[figure] == pytest.approx(mean(values))
            assert row[f"{figure}_sd"] == pytest.approx(stdev(values))
    assert len({row["kl"] for row in facts["rows"] if row["share"] == 0.25}) > 8  # the cells do differ


def test_finished_cells_are_not_computed_again(recipe, grid, capsys):
    times = {path: path.stat().st_mtime_ns for path in grid.rglob("seed_*/*.json") if path.name[0] != "m"}
    facts = json.loads((grid / "facts.json").read_text())
    first = min(times)
    first.unlink()
    recipe(grid / "run", *GRID, "--seeds", "0", "1", "--facts", str(grid / "again.json"), main=sweep.main, **SMALL)
    for path, time in times.items():
        assert (path.stat().st_mtime_ns == time) is (path != first)
    for a, b in zip(json.loads((grid / "again.json").read_text())["rows"], facts["rows"], strict=True):
        assert a["kl"] == pytest.approx(b["kl"], rel=1e-4, abs=1e-6)
    assert "skipped" in capsys.readouterr().out


def test_part_of_the_rows_has_cells_of_its_own(recipe, grid):
    one = ["--splitters", "random", "--routers", "similarity", "--seeds", "0", "--controls", "oracle"]
    facts = grid / "part.json"
    recipe(grid / "run", *one, "--eval_rows", "20", "--facts", str(facts), main=sweep.main, **SMALL)
    found = json.loads(facts.read_text())
    assert found["eval_rows"] == 20 and all("accuracy_sd" not in row for row in found["rows"])
    assert (grid / "run_sweep" / "seed_0" / "random-similarity-20.json").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--splitters", "kmeans"], "unknown splitter 'kmeans'"),
        (["--routers", "softmax"], "unknown router 'softmax'"),
        (["--controls", "orakel"], "unknown control 'orakel'"),
    ],
)
def test_mistakes_are_named_before_training(recipe, refused, tmp_path, flags, message):
    with refused(message):
        recipe(tmp_path / "run", *flags, "--facts", str(tmp_path / "facts.json"), main=sweep.main)
    assert not list(tmp_path.iterdir())


def test_a_table_names_the_budgets_that_were_compared(grid):
    facts = json.loads((grid / "facts.json").read_text())
    changed = {"sensitivity": "angular"}
    rows = [{**row, "allocation": changed.get(row["allocation"], row["allocation"])} for row in facts["rows"]]
    text = sweep_tables.tables({**facts, "rows": rows}, ["accuracy"])
    before = sweep_tables.tables(facts, ["accuracy"])
    assert "Accuracy, %, uniform budgets / budgets by angular distance:" in text
    assert "Accuracy, %, uniform budgets / budgets by sensitivity:" in before
    assert [line for line in text.splitlines() if line[:1] == "|"] == [
        line for line in before.splitlines() if line[:1] == "|"
    ]
    alone = [row for row in facts["rows"] if row["allocation"] != "sensitivity"]
    assert "Accuracy, %, uniform budgets:" in sweep_tables.tables({**facts, "rows": alone}, ["accuracy"])


def test_tables(grid, capsys, monkeypatch):
    facts = json.loads((grid / "facts.json").read_text())
    text = sweep_tables.tables(facts, ["relative_quality"])
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + 6 and {line.count("|") for line in lines} == {5}
    (row,) = (
        row
        for row in facts["rows"]
        if (row["splitter"], row["router"], row["share"], row["allocation"]) == ("random", "linear", 0.25, "uniform")
    )
    expected = f"{100 * row['relative_quality']:.1f} ± {100 * row['relative_quality_sd']:.1f} / "
    assert lines[2].startswith(f"| random | linear | {expected}")
    monkeypatch.setattr(sys, "argv", ["sweep_tables.py", str(grid / "facts.json"), "relative_quality"])
    sweep_tables.main()
    assert capsys.readouterr().out.strip() == text
    one = [row for row in facts["rows"] if row["splitter"] == "random" and row["router"] != "similarity"]
    (grid / "one.json").write_text(json.dumps({**facts, "rows": one}))
    monkeypatch.setattr(sys, "argv", ["sweep_tables.py", str(grid / "one.json"), "--plot", str(grid / "one.png")])
    sweep_tables.main()
    assert (grid / "one.png").read_bytes()[:4] == b"\x89PNG"
    monkeypatch.setattr(sys, "argv", ["sweep_tables.py", str(grid / "facts.json"), "beauty"])
    with pytest.raises(SystemExit, match="relative_quality"):
        sweep_tables.main()
