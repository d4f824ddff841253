"""time_export.py on a tiny Llama: every model has a row, and an export of another model is refused."""

import csv
import sys

import pytest
import time_export
from batches import text_batches
from tiny import tiny_model
from transformers import AutoModelForCausalLM

from moefy_hf import MoEficationConfig, export, moefy_


@pytest.fixture(scope="module")
def made(tmp_path_factory, word_tokenizer):
    """A MoEfied checkpoint, its export, and a text."""
    folder = tmp_path_factory.mktemp("made")
    model = tiny_model("llama-without-biases", "AutoModelForCausalLM").eval()
    settings = {"expert_size": 8, "splitter": "random", "k": 3, "allocation": "uniform", "calibration_tokens": 300}
    moefy_(model, MoEficationConfig(**settings), text_batches(8), progress=False)
    model.save_pretrained(folder / "moe")
    word_tokenizer.save_pretrained(folder / "moe")
    model.set_selection(k=2)  # another budget than the checkpoint's
    export(model, folder / "exported")
    export(model, folder / "dense", to="dense")
    (folder / "texts.txt").write_text(" ".join(f"Word{number % 90}" for number in range(300)))
    return folder


def run(made, monkeypatch, *flags, exported="exported") -> None:
    given = [made / "moe", made / exported, "--texts", made / "texts.txt", "--rounds", "3", "--length", "8"]
    monkeypatch.setattr(sys, "argv", ["time_export.py", *map(str, given), *map(str, flags)])
    time_export.main()


@pytest.mark.parametrize("new_tokens", [0, 2])
def test_every_model_has_a_row(made, monkeypatch, new_tokens):
    output = made / f"{new_tokens}.csv"
    run(made, monkeypatch, "--new_tokens", new_tokens, "--output", output)
    rows = list(csv.DictReader(output.open()))
    names = ["dense", "masked", "cpu", *(f"exported, {name}" for name in time_export.IMPLEMENTATIONS)]
    assert [row["implementation"] for row in rows] == names
    assert {(row["k"], row["experts"], row["new_tokens"]) for row in rows} == {("2", "6", str(new_tokens))}
    assert all(float(row["milliseconds"]) > 0 and float(row["ratio"]) > 0 for row in rows)


@pytest.mark.parametrize(
    ("changes", "flags", "message"),
    [
        ({"exported": "dense"}, (), "dense is no served MoE"),
        ({"exported": "other"}, (), "logits differ by"),
        ({}, ("--length", 500), "300 tokens, 1500 are needed"),
        ({}, ("--rounds", 0), "must be positive"),
    ],
)
def test_bad_input_is_one_line(made, monkeypatch, changes, flags, message):
    if changes.get("exported") == "other" and not (made / "other").exists():
        other = AutoModelForCausalLM.from_pretrained(made / "exported")
        for layer in other.model.layers:
            layer.block_sparse_moe.router.weight.data.neg_()  # the wrong experts
        other.save_pretrained(made / "other")
    with pytest.raises(SystemExit, match=f"^time_export.py: [^\n]*{message}[^\n]*$"):
        run(made, monkeypatch, *flags, **changes)
