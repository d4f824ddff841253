"""Recovery after conversion: what is trained, what is kept, and that it helps."""

import csv
import json
import math
import shutil
import sys
from functools import partial
from pathlib import Path

import pytest
import recovery_facts
import sweep_tables
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from moefy_hf import Sweep
from moefy_hf.modeling.moefied import is_moefied
from moefy_hf.recipes.tasks import main as run_task

HARD = {"k": 0.25, "router": "random", "splitter": "random", "allocation": "uniform"}  # loses much at first


def changed(folder, before: str, after: str) -> set[str]:
    a, b = (load_file(folder / name / "model.safetensors") for name in (before, after))
    assert a.keys() == b.keys()
    return {key for key in a if not a[key].equal(b[key])}


@pytest.fixture(scope="module")
def converted(recipe, tmp_path_factory):
    """A run with the settings HARD, which several tests go on with."""
    run = tmp_path_factory.mktemp("converted") / "run"
    recipe(run, **HARD)
    return run


TEACHER = ("--recovery_epochs", "2", "--distillation_weight", "1")


@pytest.fixture(scope="module")
def recovered(recipe, converted, tmp_path_factory):
    """The same run, recovered with all parameters."""
    run = tmp_path_factory.mktemp("recovered") / "run"
    shutil.copytree(converted, run)
    recipe(run, *TEACHER, **HARD)
    return run


@pytest.mark.parametrize("parameters", ["all", "down", "lora"])
def test_recovers_at_its_budget(recipe, converted, recovered, tmp_path, parameters, capsys):
    run = tmp_path / "run"
    shutil.copytree(recovered if parameters == "all" else converted, run)
    recipe(run, *TEACHER, "--recovery_parameters", parameters, **HARD)
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
    assert "| dense, fine-tuned for as long | all | " in out and "| MoEfied, then fine-tuned | 25 % | " in out
    for name in ("recovered", "control", "recovered.json", "control.json"):
        assert (f"{name}: done before, skipped" in out) is (parameters == "all")  # a second run skips it


def test_a_converted_checkpoint_is_recovered_as_in_the_run_that_made_it(recipe, recovered, tmp_path, capsys):
    """Its dense self teaches; nothing but the checkpoint is there. The run can be given again."""
    moe, run = tmp_path / "moe", tmp_path / "run"
    shutil.copytree(recovered / "moefied", moe)
    for _ in range(2):
        recipe(run, "--recover", str(moe), "--recovery_epochs", "2", "--budgets", "0.5")
    out = capsys.readouterr().out
    assert out.count("recovered: done before") == 1 and "sweep.json" not in out
    rows = [Sweep.load(folder / "recovered.json").rows for folder in (run, recovered)]
    (ours,), (theirs,) = (
        [row["loss"] for row in each if (row["router"], row.get("k")) == ("own", 0.25)] for each in rows
    )
    assert ours == pytest.approx(theirs, rel=0.05) and ours != Sweep.load(recovered / "sweep.json").rows[1]["loss"]
    model = AutoModelForSequenceClassification.from_pretrained(run / "recovered", trust_remote_code=True)
    assert model.config.moefication["selection"]["k"] == 0.25 and model.config.id2label == {0: "bad", 1: "good"}
    card = (run / "recovered" / "README.md").read_text()
    assert "trained on after it" in card and "| training: recovery_epochs | 2.0 |" in card
    assert "| training: distillation_weight | 1.0 |" in card and str(tmp_path) not in card
    made = {*("recovered", "recovered.json", "moefy_run.json"), *(f"scores_{name}.json" for name in SCORED)}
    assert {path.name for path in run.iterdir()} == made
    for name in ("dense", "moefied"):  # are what they were where the checkpoint was made
        ours, theirs = (json.loads((folder / f"scores_{name}.json").read_text()) for folder in (run, recovered))
        assert all(ours[key] == theirs[key] for key in ours) and len(ours) == {"dense": 1, "moefied": 2}[name]
    assert f"MoEfied model: {moe}" in out


SCORED = ("dense", "moefied", "recovered")


def test_what_cannot_be_recovered(recipe, refused, recovered, tmp_path):
    moe = tmp_path / "moe"
    shutil.copytree(recovered / "moefied", moe)
    with refused("dense is not MoEfied: moefy convert"):
        recipe(tmp_path / "run", "--recover", str(recovered / "dense"))
    with refused("schedule converts while training"):
        recipe(tmp_path / "run", "--recover", str(moe), "--schedule", "anneal")
    with refused("is a model of AutoModelForSequenceClassification, and this task is of AutoModelForTokenClass"):
        folder = tmp_path / "tagged"
        folder.mkdir()
        for split in ("train", "validation", "test"):
            (folder / f"{split}.txt").write_text("word1 X\n")
        one = partial(run_task, "token_classification")
        recipe(tmp_path / "run", "--recover", str(moe), main=one, dataset_name=str(folder))
    config = json.loads((moe / "config.json").read_text())
    (moe / "config.json").write_text(json.dumps(config | {"id2label": {"0": "good", "1": "bad"}}))
    with refused("has the classes good, bad, the data bad, good, in this order"):
        recipe(tmp_path / "run", "--recover", str(moe))
    with refused("give --model_name_or_path, or --recover"):
        recipe(tmp_path / "run", model_name_or_path=None)
    assert not (tmp_path / "run").exists()


TAU = 0.4
LEARNED = {"router": "sigmoid", "allocation": "sensitivity", "expert_size": 4}


def read_by_hand(folder, texts) -> tuple[float, float]:
    """(accuracy, share of experts with a strength of at least TAU) on validation and test, text by text."""
    model = AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=True).eval()
    tokenizer, right, strong = AutoTokenizer.from_pretrained(folder), [], []
    for site in model.moe_sites():
        weight = site.act.router.weight.detach()
        site.first.register_forward_pre_hook(
            lambda _, args, weight=weight: strong.append((args[0][0] @ weight.T).sigmoid() >= TAU)
        )
    for split in ("validation", "test"):
        with open(texts / f"{split}.csv", newline="") as file:
            for row in csv.DictReader(file):
                inputs = tokenizer(row["text"], truncation=True, max_length=10, return_tensors="pt")
                with torch.no_grad():
                    found = int(model(**inputs).logits.argmax())
                right.append(("bad", "good")[found] == row["label"])
    return sum(right) / len(right), float(torch.cat(strong).float().mean())


@pytest.fixture(scope="module")
def learnable(recipe, tmp_path_factory):
    """A run with the settings LEARNED."""
    run = tmp_path_factory.mktemp("learnable") / "run"
    recipe(run, "--selections", "top_k", "level", **LEARNED)
    return run


@pytest.mark.parametrize("parameters", ["all", "down", "lora"])
def test_learns_its_budget(recipe, inputs, learnable, tmp_path, parameters, capsys):
    run = tmp_path / "run"
    shutil.copytree(learnable, run)
    flags = ("--recovery_epochs", "2", "--recovery_parameters", parameters)
    flags += ("--learned_eta", "1", "--learned_tau", str(TAU))
    recipe(run, *flags, "--selections", "top_k", "level", **LEARNED)
    moved = changed(run, "moefied", "recovered")
    assert sum(key.endswith("router.weight") for key in moved) == 2
    if parameters == "down":
        assert all("router" in key or ".output.dense." in key and "attention" not in key for key in moved)
    else:
        assert any("attention.self.query" in key for key in moved)
    rows = Sweep.load(run / "recovered.json").rows
    (learned,) = (row for row in rows[1:] if "k" not in row)
    assert (learned["router"], learned["type"], learned["level"]) == ("own", "level", -math.log(TAU))
    assert rows.index(learned) == len(rows) - 1 == 2 * 2 * 2 + 1  # beside all budgets by all selections
    by_hand = read_by_hand(run / "recovered", Path(inputs["texts"]))
    assert 0.02 < learned["experts"] < 0.9
    assert (learned["accuracy"], learned["experts"]) == pytest.approx(by_hand, rel=1e-3)
    model = AutoModelForSequenceClassification.from_pretrained(run / "recovered", trust_remote_code=True)
    assert model.config.moefication["selection"] == {"type": "level", "level": -math.log(TAU)}
    spent = sum(site.act.k for site in model.moe_sites()) / 32  # on training texts
    assert spent == pytest.approx(learned["experts"], abs=0.1)
    model.set_selection(k=0.25, allocation="sensitivity")
    assert sum(site.act.k for site in model.moe_sites()) == pytest.approx(8, abs=1)
    cell = f"{100 * learned['accuracy'] / Sweep.load(run / 'sweep.json').rows[0]['accuracy']:.1f}"
    assert f"| MoEfied, then fine-tuned | as learned | {100 * learned['accuracy']:.1f} % |" in capsys.readouterr().out
    shown = sweep_tables.tables(recovery_facts.facts_of([run]), ["relative_quality"])
    (line,) = (line for line in shown.splitlines() if "| sigmoid, level, learned | " in line)
    assert line.replace(" ", "").strip("|").split("|")[2:].count(cell) == 1 and line.count(".") == 1
    card = (run / "recovered" / "README.md").read_text()
    for part in ("| training: learned_eta | 1.0 |", "| training: learned_tau | 0.4 |", "`level`, level 0.91"):
        assert part in card
    assert "moefication" not in json.loads((run / "control" / "config.json").read_text())


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


def test_a_larger_eta_is_another_recovery_and_computes_less(recipe, refused, tmp_path):
    shares = {}
    for eta in ("0", "10"):
        run = tmp_path / f"run_{eta}"
        if shares:
            shutil.copytree(tmp_path / "run_0", run)
            with refused(r"other settings \(learned_eta changed\)"):
                recipe(run, "--recovery_epochs", "3", "--learned_eta", eta, **LEARNED)
            shutil.rmtree(run / "recovered")
            for name in ("recovered.json", "scores_recovered.json"):
                (run / name).unlink()
        recipe(run, "--recovery_epochs", "3", "--learned_eta", eta, **LEARNED)  # all else is taken over
        shares[eta] = Sweep.load(run / "recovered.json").rows[-1]["experts"]
    assert shares["0"] > 1.5 * shares["10"]
    assert not changed(tmp_path, "run_0/control", "run_10/control")


def test_what_seeds_have_learned_is_averaged(recipe, tmp_path):
    runs = [tmp_path / f"run_{seed}" for seed in (0, 1)]
    for seed, run in enumerate(runs):
        recipe(run, "--recovery_epochs", "1", "--learned_eta", "1", "--controls", "none", seed=seed, **LEARNED)
    facts = recovery_facts.facts_of(runs)
    learned = [Sweep.load(run / "recovered.json").rows[-1] for run in runs]
    assert learned[0]["experts"] != learned[1]["experts"]
    (row,) = (row for row in facts["rows"] if row["router"] == "sigmoid, level, learned")
    assert row["seeds"] == [0, 1] and row["allocation"] == "learned"
    assert row["share"] == row["experts"] == pytest.approx(sum(each["experts"] for each in learned) / 2)
    dense = [Sweep.load(run / "sweep.json").rows[0]["accuracy"] for run in runs]
    relative = [row["accuracy"] / whole for row, whole in zip(learned, dense, strict=True)]
    assert row["relative_quality"] == pytest.approx(sum(relative) / 2)
    shown = sweep_tables.tables(facts, ["relative_quality"])
    assert "uniform budgets / budgets by sensitivity / budgets as learned:" in shown
    assert f" {row['share']:.0%} |" in shown and f"| {100 * row['relative_quality']:.1f} ± " in shown
    assert all(each["share"] == 1 for each in facts["rows"] if "dense" in each["router"])
    assert {each["router"] for each in facts["rows"]} == {
        *("dense", "dense, trained on", "sigmoid", "sigmoid, recovered", "sigmoid, level, learned")
    }


def test_facts_need_finished_runs_that_differ_only_in_their_seed(recipe, tmp_path, monkeypatch):
    recipe(tmp_path / "run", max_steps=2)
    with pytest.raises(ValueError, match="lacks recovered.json or scheduled.json"):
        recovery_facts.facts_of([tmp_path / "run"])
    shutil.copytree(tmp_path / "run", tmp_path / "b")  # which goes on from there
    for name, k in (("a", 0.25), ("b", 0.5)):
        recipe(tmp_path / name, "--recovery_epochs", "0.5", max_steps=2, k=k)
    with pytest.raises(ValueError, match="b differs from .*a in k"):
        recovery_facts.facts_of([tmp_path / "a", tmp_path / "b"])
    with pytest.raises(ValueError, match="differ in their seed, got 42, 42"):
        recovery_facts.facts_of([tmp_path / "a", tmp_path / "a"])
    monkeypatch.setattr(sys, "argv", ["recovery_facts.py", str(tmp_path / "facts.json"), str(tmp_path)])
    with pytest.raises(SystemExit, match="lacks sweep.json"):
        recovery_facts.main()
    assert not (tmp_path / "facts.json").exists()
