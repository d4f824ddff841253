"""The recipe end to end, in this process: a tiny BERT learns from small csv files, is MoEfied and swept."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from moefy_hf import Sweep
from moefy_hf.hub.card import PLOT
from moefy_hf.hub.facts import read_facts
from moefy_hf.modeling.ffn_sites import find_sites
from moefy_hf.modeling.moefied import is_moefied
from moefy_hf.recipes.stages import MARKER, read_made


@pytest.fixture(scope="module")
def finished(recipe, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "first"
    recipe(folder)
    return folder


def times(folder: Path) -> dict[str, int]:
    """When the results were written; the picture is copied anew each time."""
    results = [*folder.glob("dense/*"), *folder.glob("moefied/*"), folder / "sweep.json"]
    return {str(path): path.stat().st_mtime_ns for path in results}


def test_without_matplotlib_everything_but_the_picture(recipe, finished, tmp_path, monkeypatch, capsys):
    shutil.copytree(finished, tmp_path / "run")
    for path in ("sweep.json", "sweep.png", f"moefied/{PLOT}"):
        (tmp_path / "run" / path).unlink()
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    recipe(tmp_path / "run")
    out = capsys.readouterr().out
    assert "no plot: plots need matplotlib: pip install 'moefy-hf[plots]'" in out and "MoEfied model: " in out
    assert (tmp_path / "run" / "sweep.json").exists() and not [*(tmp_path / "run").rglob("*.png")]


def test_leaves_models_sweep_and_picture(finished):
    assert {path.name for path in finished.iterdir()} == {
        *("dense", "moefied", "sweep.json", "sweep.png", MARKER),
        *("scores_dense.json", "scores_moefied.json"),
    }
    assert (finished / "sweep.png").read_bytes()[:4] == b"\x89PNG"
    dense = AutoModelForSequenceClassification.from_pretrained(finished / "dense")
    assert not is_moefied(dense) and dense.config.id2label == {0: "bad", 1: "good"}
    assert dense.config.hidden_act == "relu"
    assert all(isinstance(site.act, torch.nn.ReLU) for site in find_sites(dense))
    for name in ("dense", "moefied"):
        assert AutoTokenizer.from_pretrained(finished / name).pad_token == "[PAD]"


def test_the_converted_model_is_the_trained_one(finished):
    dense = AutoModelForSequenceClassification.from_pretrained(finished / "dense").eval()
    model = AutoModelForSequenceClassification.from_pretrained(finished / "moefied", trust_remote_code=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(finished / "moefied")
    batch = tokenizer(["word1 superb word2", "dull word3"], padding=True, return_tensors="pt")
    assert type(model).__name__ == "MoefiedBertForSequenceClassification"
    section = model.config.moefication
    assert section["splitter"] == "coactivation" and section["expert_size"] == 8
    assert section["selection"] == {"type": "top_k", "k": 0.5, "allocation": "sensitivity"}
    assert sum(site.act.selection.k for site in model.moe_sites()) == 8
    model.set_selection(k=1.0)
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).logits, dense(**batch).logits, rtol=1e-4, atol=1e-5)
    facts = read_facts(finished / "moefied")
    report = facts["conversion"]
    assert report["experts"] == [8, 8] and report["calibration_tokens"] == 900 and len(report["fits"]) == 2
    assert facts["calibration"]["split"] == "train" and facts["base_model"] == "model"  # no path of this machine
    assert facts["sweep"] == json.loads((finished / "sweep.json").read_text())


def test_the_converted_model_has_a_card(finished):
    card = ModelCard.load(finished / "moefied" / "README.md")
    assert card.data.pipeline_tag == "text-classification"
    assert "## Quality against compute" in card.text and "texts, validation and test" in card.text
    assert str(finished) not in card.content and (finished / "moefied" / "quality_against_compute.png").exists()


def test_the_sweep_is_of_validation_and_test(finished):
    sweep = Sweep.load(finished / "sweep.json")
    assert sweep.facts["positions"] == 48 and sweep.facts["quality"] == "accuracy"
    settings = {(row["router"], row["allocation"], row["k"]) for row in sweep.rows[1:]}
    assert len(sweep.rows) == 1 + 12 and settings == {
        (router, allocation, share)
        for router in ("own", "oracle", "random")
        for allocation in ("uniform", "sensitivity")
        for share in (0.25, 0.5)
    }
    assert sweep.rows[0]["accuracy"] > 0.9  # it has learnt something, so that there is something to lose
    own, dice = (sum(row["kl"] for row in sweep.rows[1:] if row["router"] == router) for router in ("own", "random"))
    assert own < dice
    dense = AutoModelForSequenceClassification.from_pretrained(finished / "dense").eval()
    tokenizer, right = AutoTokenizer.from_pretrained(finished / "dense"), 0
    texts = Path(read_made(finished)["dense"]["dataset_name"])
    for split in ("validation", "test"):
        for line in (texts / f"{split}.csv").read_text().splitlines()[1:]:
            text, label = line.split(",")
            batch = tokenizer(text, truncation=True, max_length=10, return_tensors="pt")
            right += dense.config.id2label[int(dense(**batch).logits.argmax())] == label
    assert sweep.rows[0]["accuracy"] == pytest.approx(right / 48)


def test_a_second_run_skips_what_is_finished(recipe, finished, capsys):
    before = times(finished)
    recipe(finished)
    assert times(finished) == before and len(before) > 10
    out = capsys.readouterr().out
    assert [f"{name}: done before, skipped" in out for name in ("dense", "moefied", "sweep.json")] == [True] * 3
    assert "| router |" in out  # and still shows the table


def test_an_unfinished_run_goes_on(recipe, finished, tmp_path):
    """Without the sweep and the conversion: they are made again from the dense model that is there."""
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    (folder / "sweep.json").unlink()
    shutil.rmtree(folder / "moefied")
    before = {path.name: path.stat().st_mtime_ns for path in (folder / "dense").iterdir()}
    recipe(folder)
    assert {path.name: path.stat().st_mtime_ns for path in (folder / "dense").iterdir()} == before
    again = Sweep.load(folder / "sweep.json")
    for a, b in zip(again.rows, Sweep.load(finished / "sweep.json").rows, strict=True):  # and give the same results
        assert a["accuracy"] == b["accuracy"] and a["kl"] == pytest.approx(b["kl"], rel=1e-4, abs=1e-7)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"k": 0.25}, "k"),
        ({"learning_rate": 0.1}, "learning_rate"),
        ({"seed": 1}, "seed"),
        ({"budgets": 0.1}, "budgets"),
    ],
)
def test_changed_settings_are_refused(recipe, refused, finished, settings, named):
    before = times(finished), (finished / MARKER).read_text()
    with refused(rf"other settings \({named} changed\)"):
        recipe(finished, **settings)
    assert (times(finished), (finished / MARKER).read_text()) == before


def test_a_foreign_folder_is_refused(recipe, refused, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with refused("not the output of a moefy recipe"):
        recipe(tmp_path, redo=True)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


CHEAP = {"router": "random", "splitter": "random", "allocation": "uniform"}
LEARNS = {"recovery_epochs": 1, "router": "sigmoid"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"text_column": "sentence"}, "no column 'sentence'.*text, label"),
        ({"splitter": "kmeans"}, "unknown splitter 'kmeans'.*coactivation"),
        ({"router": "softmax"}, "unknown router 'softmax'.*linear"),
        ({"k": 0.0}, "0.0"),
        ({"k": 1.5}, "1.5"),
        ({"allocation": "greedy"}, "unknown allocation 'greedy'.*sensitivity"),
        ({"activation": "rely"}, "unknown activation 'rely'.*relu"),
        ({"sparsity_penalty": "l2"}, "unknown penalty 'l2'.*l1"),
        ({"expert_sizes": 8}, "expert_sizes"),
        ({"expert_size": 7}, "64 neurons.*7"),
        ({"frozen": "head"}, "frozen: no parameter of BertForSequenceClassification has 'head' in its name"),
        ({"controls": "orakel"}, "unknown control 'orakel'"),
        ({"budgets": 1.5}, "1.5"),
        ({"recovery_parameters": "some"}, "unknown recovery_parameters 'some'.*lora"),
        ({"recovery_epochs": -1.0}, "must not be negative"),
        ({"lora_rank": 0}, "at least 1"),
        ({"schedule": "slowly"}, "unknown schedule 'slowly'.*anneal"),
        ({"learned_eta": -0.5} | LEARNS, "learned_eta is a weight and must not be negative, got -0.5"),
        ({"learned_eta": "nan"} | LEARNS, "learned_eta is a weight"),
        ({"learned_eta": 1.0, "learned_tau": 1.0} | LEARNS, "learned_tau must lie between 0 and 1.*got 1.0"),
        ({"learned_tau": 0.3} | LEARNS, "learned_tau 0.3 is a setting of learned_eta"),
        ({"learned_eta": 1.0, "recovery_epochs": 1}, "needs router 'sigmoid', got 'linear'"),
        ({"learned_eta": 1.0, "router": "sigmoid"}, "learned_eta 1.0 is a setting of recovery: give recovery_epochs"),
        ({"learned_eta": 1.0, "compensation": True} | LEARNS, "what compensation adds"),
        ({"learned_eta": 1.0, "fsdp": "full_shard"} | LEARNS, "FSDP keeps parameters in shards"),
    ],
)
def test_mistakes_are_named_before_training(recipe, refused, tmp_path, settings, message):
    with refused(message):
        recipe(tmp_path / "run", **settings)
    assert not (tmp_path / "run" / "dense").exists()


def test_redo_replaces_everything(recipe, tmp_path):
    folder = tmp_path / "run"
    recipe(folder, max_steps=2)
    before = times(folder)
    recipe(folder, "--redo", max_steps=2, k=0.25)
    after = times(folder)
    assert all(after[path] != before[path] for path in before)
    config = json.loads((folder / "moefied" / "config.json").read_text())
    assert config["moefication"]["selection"]["k"] == 0.25
    recipe(folder, max_steps=2, k=0.25)  # these are its settings now
    assert times(folder) == after


def test_what_is_frozen_stays_as_it_came(recipe, inputs, tmp_path):
    recipe(tmp_path / "run", max_steps=2, frozen=["embeddings", "layer.0"], **CHEAP)
    before = AutoModelForSequenceClassification.from_pretrained(inputs["model"]).state_dict()
    after = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "dense").state_dict()
    moved = {name for name in before if not before[name].equal(after[name])}
    assert not any("embeddings" in name or "layer.0" in name for name in moved)
    assert any("layer.1.attention" in name for name in moved)


def test_uniform_budgets_need_no_sensitivity(recipe, tmp_path):
    recipe(tmp_path / "run", max_steps=1, allocation="uniform", router="mlp", splitter="parameter_clustering")
    rows = Sweep.load(tmp_path / "run" / "sweep.json").rows
    assert {row["allocation"] for row in rows[1:]} == {"uniform"}


def test_budgets_by_angles_stand_beside_uniform_ones(recipe, tmp_path):
    settings = {"router": "random", "splitter": "random", "schedule": "one_step"}
    recipe(tmp_path / "run", "--controls", "random", max_steps=2, allocation="angular", **settings)
    for name in ("sweep", "scheduled"):
        rows = Sweep.load(tmp_path / "run" / f"{name}.json").rows
        assert [row["allocation"] for row in rows if row["router"] == "own"] == ["uniform"] * 2 + ["angular"] * 2
    section = json.loads((tmp_path / "run" / "scheduled" / "config.json").read_text())["moefication"]
    assert "sensitivity" not in section and len(section["angular"]["distance"]) == 2


def test_reduced_precision(recipe, tmp_path):
    recipe(tmp_path / "run", max_steps=1, bf16=True)
    assert len(Sweep.load(tmp_path / "run" / "sweep.json").rows) == 13


def test_more_can_be_asked_of_a_finished_run(recipe, refused, finished, tmp_path):
    """What was trained is trained once: recovery goes on from there."""
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    before = times(folder)
    recipe(folder, "--recovery_epochs", "0.2")
    assert times(folder) == before and (folder / "recovered.json").exists()
    made = (folder / "recovered.json").stat().st_mtime_ns
    recipe(folder)  # which does not ask for it
    recipe(folder, "--recovery_epochs", "0.2")
    assert (folder / "recovered.json").stat().st_mtime_ns == made
    with refused(r"other settings \(recovery_parameters changed\)"):
        recipe(folder, "--recovery_epochs", "0.2", "--recovery_parameters", "down")


def test_without_controls(recipe, finished, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    (folder / "sweep.json").unlink()
    recipe(folder, "--controls", "none")
    assert {row["router"] for row in Sweep.load(folder / "sweep.json").rows} == {"dense", "own"}


def test_moefied_while_training(recipe, finished, tmp_path, capsys):
    """One training from the model that the dense one began with, beside it."""
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    recipe(folder, "--schedule", "anneal", "--distillation_weight", "1")
    model = AutoModelForSequenceClassification.from_pretrained(folder / "scheduled", trust_remote_code=True)
    assert is_moefied(model) and model.config.moefication["splits"] == 1
    assert model.config.moefication["selection"]["k"] == 0.5 and model.config.hidden_act == "relu"
    rows = Sweep.load(folder / "scheduled.json").rows
    assert next(row["accuracy"] for row in rows if row["router"] == "own" and row["k"] == 0.5) > 0.9
    scores = json.loads((folder / "scores_scheduled.json").read_text())["scheduled at 0.5"]
    assert f"| MoEfied while training | 50 % | {100 * scores['accuracy']:.1f} % |" in capsys.readouterr().out


def test_a_schedule_that_cannot_run_is_found_before_training(recipe, refused, tmp_path, monkeypatch):
    with refused("of 3: train longer"):
        recipe(tmp_path / "run", "--schedule", "switchable", max_steps=3)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with refused("FSDP"):
        recipe(tmp_path / "other", "--schedule", "anneal")
    assert not (tmp_path / "run" / "dense").exists() and not (tmp_path / "other" / "dense").exists()
