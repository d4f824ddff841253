"""Recovery after conversion: what is trained, what is kept, and that it helps."""

import json
import sys

import pytest
import recovery_facts
import sweep_tables
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from moefy_hf import Sweep
from moefy_hf.modeling.moefied import is_moefied

HARD = {"share": 0.25, "router": "random", "splitter": "random", "allocation": "uniform"}  # loses much at first


def changed(folder, before: str, after: str) -> set[str]:
    a, b = (load_file(folder / name / "model.safetensors") for name in (before, after))
    assert a.keys() == b.keys()
    return {key for key in a if not a[key].equal(b[key])}


@pytest.mark.parametrize("parameters", ["all", "down", "lora"])
def test_recovers_at_its_budget(recipe, tmp_path, parameters, capsys):
    recipe(
        tmp_path / "run",
        *("--recovery_epochs", "2", "--recovery_parameters", parameters, "--distillation_weight", "1"),
        **HARD,
    )
    run = tmp_path / "run"
    model = AutoModelForSequenceClassification.from_pretrained(run / "recovered", trust_remote_code=True)
    assert type(model).__name__.startswith("Moefied") and model.config.moefication["selection"]["k"] == 0.25
    assert not is_moefied(AutoModelForSequenceClassification.from_pretrained(run / "control"))
    moved = changed(run, "moefied", "recovered")
    assert moved and not any("router" in key for key in moved)
    if parameters == "down":
        assert all(".output.dense." in key and "attention" not in key for key in moved)
    if parameters == "lora":
        assert all(key.endswith("weight") or key.startswith("classifier") for key in moved)
        assert any("attention.self.query" in key for key in moved)
    assert changed(run, "dense", "control")
    before, after = (
        next(row["loss"] for row in Sweep.load(run / name).rows if row["router"] == "own" and row["k"] == 0.25)
        for name in ("sweep.json", "recovered.json")
    )
    assert after < before
    assert 0 < json.loads((run / "control.json").read_text())["accuracy"] <= 1
    card = (run / "recovered" / "README.md").read_text()
    assert f"| training: recovery_parameters | {parameters} |" in card and "trained on after it" in card
    assert "num_train_epochs" not in card  # those of the dense model
    out = capsys.readouterr().out
    assert "trained for as many steps as recovery: " in out and "| random | fixed random, recovered | " in out


def test_a_second_run_skips_it(recipe, tmp_path, capsys):
    for _ in range(2):
        capsys.readouterr()
        recipe(tmp_path / "run", "--recovery_epochs", "0.5", max_steps=2, **HARD)
    out = capsys.readouterr().out
    for name in ("recovered", "control", "recovered.json", "control.json"):
        assert f"{name}: done before, skipped" in out


def test_facts_are_means_over_runs(recipe, tmp_path, capsys, monkeypatch):
    runs = [tmp_path / f"run_{seed}" for seed in (0, 1)]
    for seed, run in enumerate(runs):
        recipe(run, "--recovery_epochs", "0.5", "--controls", "oracle", seed=seed, max_steps=4)
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["recovery_facts.py", str(tmp_path / "facts.json"), *map(str, runs)])
    recovery_facts.main()
    facts = json.loads((tmp_path / "facts.json").read_text())
    assert {row["router"] for row in facts["rows"]} == {
        *("dense", "dense, trained on", "linear", "linear, recovered", "oracle")
    }
    sweeps = {name: [Sweep.load(run / name).rows for run in runs] for name in ("sweep.json", "recovered.json")}
    dense = [rows[0]["accuracy"] for rows in sweeps["sweep.json"]]
    for row in facts["rows"]:
        assert row["seeds"] == [0, 1]
        if row["router"] == "linear, recovered":
            found = [
                next(
                    each["accuracy"]
                    for each in rows
                    if (each["router"], each.get("allocation"), each.get("k"))
                    == ("own", row["allocation"], row["share"])
                )
                for rows in sweeps["recovered.json"]
            ]
            assert row["relative_quality"] == pytest.approx(sum(a / b for a, b in zip(found, dense, strict=True)) / 2)
    controls = [json.loads((run / "control.json").read_text())["accuracy"] for run in runs]
    (row,) = (row for row in facts["rows"] if row["router"] == "dense, trained on")
    assert row["accuracy"] == pytest.approx(sum(controls) / 2)
    out = capsys.readouterr().out
    assert not any("agreement" in row for row in facts["rows"] if "recovered" in row["router"])  # with the dense one
    monkeypatch.setattr(sys, "argv", ["sweep_tables.py", str(tmp_path / "facts.json"), "--plot", "plot.png"])
    with pytest.raises(SystemExit, match="these facts have linear, linear, recovered"):
        sweep_tables.main()
    assert f"as recovery: {100 * row['accuracy']:.1f} ± " in out and "| coactivation | linear, recovered |" in out


def test_facts_need_finished_runs_that_differ_only_in_their_seed(recipe, tmp_path, monkeypatch):
    recipe(tmp_path / "run", max_steps=2)
    with pytest.raises(ValueError, match="lacks recovered.json or scheduled.json"):
        recovery_facts.facts_of([tmp_path / "run"])
    for name, share in (("a", 0.25), ("b", 0.5)):
        recipe(tmp_path / name, "--recovery_epochs", "0.5", max_steps=2, share=share)
    with pytest.raises(ValueError, match="b differs from .*a in share"):
        recovery_facts.facts_of([tmp_path / "a", tmp_path / "b"])
    with pytest.raises(ValueError, match="differ in their seed, got 42, 42"):
        recovery_facts.facts_of([tmp_path / "a", tmp_path / "a"])
    monkeypatch.setattr(sys, "argv", ["recovery_facts.py", str(tmp_path / "facts.json"), str(tmp_path)])
    with pytest.raises(SystemExit, match="lacks sweep.json"):
        recovery_facts.main()
    assert not (tmp_path / "facts.json").exists()
