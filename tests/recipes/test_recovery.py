"""Recovery after conversion: what is trained, what is kept, and that it helps."""

import json

import pytest
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
    out = capsys.readouterr().out
    assert "| experts | budgets | without training | recovered |" in out and "| 25.0% | uniform |" in out


def test_a_second_run_skips_it(recipe, tmp_path, capsys):
    for _ in range(2):
        capsys.readouterr()
        recipe(tmp_path / "run", "--recovery_epochs", "0.5", max_steps=2, **HARD)
    out = capsys.readouterr().out
    for name in ("recovered", "control", "recovered.json", "control.json"):
        assert f"{name}: done before, skipped" in out
