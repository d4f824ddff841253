"""`moefy analyze`, `ablate` and `prune` on tiny checkpoints."""

import json
import sys
from pathlib import Path

import pytest
import torch
from batches import text_batches
from planted import CLASS, number_tokenizer, planted_model, write_texts
from tiny import distance, run, tiny_inputs, tiny_model
from transformers import AutoModelForSequenceClassification

from moefy_hf import MoEficationConfig, moefy_
from moefy_hf.cli import analysis as analysis_commands
from moefy_hf.cli.main import main
from moefy_hf.hub.card import model_card, write_card
from moefy_hf.hub.facts import read_facts

sys.path.insert(0, str(Path(__file__).parents[2] / "recipes" / "figures"))
from expert_facts import facts_of  # noqa: E402


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint, labelled texts, and what the three commands make of them."""
    pytest.importorskip("plotly", reason="needs plotly: pip install 'moefy-hf[report]'")
    found = tmp_path_factory.mktemp("commands")
    model = planted_model(k=2)
    model.save_pretrained(found / "moe")
    number_tokenizer().save_pretrained(found / "moe")
    write_texts(found / "texts.csv", 400)
    write_texts(found / "test.csv", 60, seed=1)
    moe, texts, test = (str(found / name) for name in ("moe", "texts.csv", "test.csv"))
    ablate = ["--measure", "3", "--together", "1", "4", "--test", test, "--output", str(found / "ablation.json")]
    main(["ablate", moe, "--data", texts, "--topic", f"LABEL_{CLASS}", *ablate])
    report = ["--compare", moe, "--removal", str(found / "ablation.json"), "--output", str(found / "report")]
    main(["analyze", moe, "--data", texts, "--max_length", "16", *report])
    main(["prune", moe, str(found / "small"), "--count", "2", "--data", texts])
    main(["prune", moe, str(found / "unneeded"), "--count", "1", "--ranking", str(found / "ablation.json")])
    return found


def test_a_report_is_written(folder):
    text = (folder / "report" / "report.html").read_text()
    assert f"Without what &#39;LABEL_{CLASS}&#39; needs" in text and "adjusted Rand index" in text
    assert (folder / "report" / "partitions.csv").read_text().count(",1.0,") >= 2  # itself


def test_the_card_says_what_was_found(folder):
    facts = read_facts(folder / "moe")["analysis"]
    assert facts["facts"]["texts"] == 400 and "strongest" in facts
    write_card(folder / "moe")
    text = (folder / "moe" / "README.md").read_text()
    assert "## What the experts respond to" in text and "Measured on 400 texts of texts.csv." in text
    if "](experts.png)" in text:  # where matplotlib is
        assert (folder / "moe" / "experts.png").read_bytes()[:4] == b"\x89PNG"


def test_a_topic_is_split_off(folder):
    found = json.loads((folder / "ablation.json").read_text())
    assert [row["experts off"] for row in found["together"]] == [0, 1, 4]
    assert set(found["together"][0]) >= {f"LABEL_{CLASS}", "all others", "random: all others"}
    assert len(found["ranking"]) == 12 and len(found["rows"]) == 3


def test_a_pruned_checkpoint_is_an_ordinary_one(folder):
    before = AutoModelForSequenceClassification.from_pretrained(folder / "moe", trust_remote_code=True)
    small = AutoModelForSequenceClassification.from_pretrained(folder / "small", trust_remote_code=True).eval()
    dense = AutoModelForSequenceClassification.from_pretrained(folder / "small").eval()
    assert dense.config.intermediate_size == 32 and before.config.intermediate_size == 48
    small.set_selection(k=1.0)
    assert distance(run(small, tiny_inputs("bert")), run(dense, tiny_inputs("bert"))) < 1e-6
    assert (folder / "small" / "tokenizer.json").exists()
    assert "2 of 6 experts of every layer: the least used on texts.csv" in str(model_card(folder / "small"))


def test_the_least_needed_go(folder):
    ranking = json.loads((folder / "ablation.json").read_text())["ranking"]
    last = {layer: expert for layer, expert in ranking}  # the last one of each layer stays
    old = AutoModelForSequenceClassification.from_pretrained(folder / "moe")
    new = AutoModelForSequenceClassification.from_pretrained(folder / "unneeded")
    for layer, expert in last.items():
        rows = old.bert.encoder.layer[layer].intermediate.dense.weight.unflatten(0, (6, 8))
        kept = torch.cat([rows[:expert], rows[expert + 1 :]]).flatten(0, 1)
        assert torch.equal(kept, new.bert.encoder.layer[layer].intermediate.dense.weight)


def test_facts_of_an_analysis(folder):
    analysis = json.loads((folder / "report" / "analysis.json").read_text())
    facts = facts_of(analysis, json.loads((folder / "ablation.json").read_text()), ["moefy analyze"])
    assert facts["specialisation"] == analysis["specialisation"] and f"LABEL_{CLASS}" in facts["layers"][0]["topics"]
    assert "experts" not in facts["layers"][0]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["ablate", "{moe}"], "required: --data"),
        (["ablate", "{moe}", "--data", "{csv}", "--topic", "sports"], "unknown class 'sports'; choose from LABEL_0"),
        (["ablate", "{moe}", "--data", "{csv}", "--test", "{csv}"], "--test is for --together"),
        (["ablate", "{moe}", "--data", "{csv}", "--together", "1", "--test", "{new}"], "is no file"),
        (["ablate", "{moe}", "--data", "{csv}", "--together", "13"], "--together 13 is more than the 12 experts"),
        (["ablate", "{moe}", "--data", "{csv}", "--measure", "-2"], "a whole number from 1, got '-2'"),
        (["analyze", "{moe}", "--data", "{csv}", "--output", "{new}", "--removal", "{other}"], "it has no 'title'"),
        (["prune", "{moe}", "{new}", "--count", "1", "--ranking", "{other}"], "ranks other experts"),
        (["prune", "{moe}", "{new}", "--count", "1", "--ranking", "{new}"], "is no file that moefy ablate wrote"),
        (["prune", "{moe}", "{new}", "--count", "1", "--ranking", "{csv}"], "is no file that moefy ablate wrote"),
        (["ablate", "{moe}", "--data", "{csv}", "--topic", "LABEL_1", "--other", "{csv}"], "leave out --other"),
        (["analyze", "{moe}", "--data", "{csv}", "--output", "{csv}"], "is a file: name a folder"),
        (["analyze", "{moe}", "--data", "{csv}x", "--output", "{new}"], "is no file"),
        (["prune", "{moe}", "{new}", "--count", "2"], "give --ranking"),
        (["prune", "{moe}", "{new}", "--count", "6", "--data", "{csv}"], "choose 1 to 5"),
        (["prune", "{moe}", "{moe}", "--count", "2", "--data", "{csv}"], "exists: choose another"),
    ],
)
def test_bad_input_is_one_line(folder, arguments, message, capsys, monkeypatch):
    names = {"moe": folder / "moe", "csv": folder / "texts.csv", "new": folder / "new", "other": folder / "other.json"}
    names["other"].write_text(json.dumps({"ranking": [[0, expert] for expert in range(12)]}))  # of another model
    for name in ("ablate", "analyze", "measure_load"):
        monkeypatch.setattr(analysis_commands, name, lambda *args, **kwargs: pytest.fail("work was begun"))
    with pytest.raises(SystemExit) as stop:
        main([argument.format(**names) for argument in arguments])
    captured = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and message in captured[-1] and not (folder / "new").exists()


def test_what_cannot_be_pruned_is_refused_before_texts_are_read(folder, tmp_path, capsys, monkeypatch):
    model = tiny_model("bert", "AutoModelForSequenceClassification")
    selection = {"type": "top_k", "k": 2, "allocation": "uniform"}
    config = MoEficationConfig(expert_size=8, splitter="random", router="mlp", selection=selection)
    moefy_(model, config, text_batches(2), progress=False)
    model.save_pretrained(tmp_path / "mlp")
    monkeypatch.setattr(analysis_commands, "measure_load", lambda *args: pytest.fail("work was begun"))
    with pytest.raises(SystemExit) as stop:
        main(
            ["prune", str(tmp_path / "mlp"), str(tmp_path / "new"), "--count", "1", "--data", str(folder / "test.csv")]
        )
    assert stop.value.code == 2 and "a MLPRouter mixes experts" in capsys.readouterr().err
