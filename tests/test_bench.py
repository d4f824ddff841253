"""`moefy bench` times what it has checked, and refuses what makes no sense."""

import csv
import json
import re
import sys

import pytest
from tiny import convert, tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from moefy_hf import bench as module
from moefy_hf import model_card
from moefy_hf.bench import PRESETS, bench, least_seconds
from moefy_hf.benchmarks import end_to_end
from moefy_hf.cli import main


@pytest.fixture
def little(monkeypatch):
    monkeypatch.setattr(module, "COLD_BYTES", 10_000_000)
    monkeypatch.setattr(module, "machine_limits", lambda: {"bytes_per_second": 1e10, "flops_per_second": 1e11})


@pytest.mark.parametrize("preset", ["minilm", "smollm2-135m"])
def test_rows(little, preset, tmp_path, capsys):
    file = tmp_path / "bench.json"
    sizes = ["--tokens", "1", "9", "--rounds", "4", "--expert-size", "16"]
    main(["bench", "--preset", preset, *sizes, "--json", str(file)])
    found = json.loads(file.read_text())
    assert found["settings"]["k"] == 19 and found["settings"]["gated"] is PRESETS[preset].gated
    assert [(row["implementation"], row["tokens"]) for row in found["rows"]] == [("cpu", 1), ("cpu", 9)]
    for row in found["rows"]:
        assert row["ratio"] > 0 and row["spread"][0] <= row["ratio"] <= row["spread"][1]
        assert row["ratio_best_dense"] > 0 and row["fraction_of_bound"] > 0
    assert "| 9 | " in capsys.readouterr().out


def test_a_wrong_kernel_is_not_timed(little, monkeypatch):
    right = module.MoeFfn.__call__
    monkeypatch.setattr(module.MoeFfn, "__call__", lambda *args: (right(*args)[0] * 1.01, None))
    with pytest.raises(RuntimeError, match="nothing was timed"):
        bench("minilm", tokens=[1], rounds=1, progress=False)


def test_the_bound():
    """One token reads the selected rows and the router once; many tokens of all experts are bound by arithmetic."""
    shape, limits = PRESETS["t5-base"], {"bytes_per_second": 1.0, "flops_per_second": 1e12}
    assert least_seconds(shape, 32, 19, 1, limits) == pytest.approx(4 * 768 * (2 * 19 * 32 + 96))
    limits = {"bytes_per_second": 1e12, "flops_per_second": 1.0}
    assert least_seconds(shape, 32, 96, 10, limits) == pytest.approx(2 * 10 * 768 * (2 * 3072 + 96))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "t6"], "unknown preset 't6'; choose from minilm, t5-base"),
        (["--expert-size", "7"], "experts of 7 neurons do not divide the 3072 of t5-base"),
        (["--share", "1.5"], r"share must lie in \(0, 1\]"),
        (["--tokens", "0"], "tokens and threads be positive"),
        (["--json", "no/such/file.json"], "there is no folder for no/such/file.json"),
    ],
)
def test_bad_input(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["bench", *arguments])
    assert stopped.value.code == 2
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize("new_tokens", [0, 3])
def test_end_to_end(new_tokens, tmp_path, monkeypatch, capsys):
    model = tiny_model("llama-without-biases", "AutoModelForCausalLM")
    convert(model, 2)
    model.save_pretrained(tmp_path / "moe")
    words = Tokenizer(models.WordLevel({f"w{number}": number for number in range(99)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w2").save_pretrained(tmp_path / "moe")
    (tmp_path / "texts.txt").write_text("\n".join(f"w{n} w{n + 1} w{n + 2}" for n in range(5, 15)))
    given = [str(tmp_path / "moe"), "--texts", str(tmp_path / "texts.txt"), "--rounds", "3", "--batch", "2"]
    flags = ["--new_tokens", str(new_tokens), "--csv", str(tmp_path / "out.csv"), "--facts"]
    monkeypatch.setattr(sys, "argv", ["end_to_end", *given, *flags])
    end_to_end.main()
    with open(tmp_path / "out.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["implementation"] for row in rows] == ["dense", "masked", "cpu"]
    assert float(rows[0]["times_dense"]) == 1 and all(float(row["times_dense"]) > 0 for row in rows)
    assert {(row["tokens"], row["new_tokens"], row["rounds"], row["share"]) for row in rows} == {
        ("6", str(new_tokens), "3", "0.333")
    }
    card = str(model_card(tmp_path / "moe"))
    assert "## Speed" in card and "| implementation | times_dense |" in card and "| cpu | " in card


def test_bad_input_end_to_end(tmp_path, monkeypatch, capsys):
    tiny_model("llama", "AutoModelForCausalLM").save_pretrained(tmp_path / "dense")
    (tmp_path / "texts.txt").write_text("w1 w2")
    given = ["end_to_end", str(tmp_path / "dense"), "--texts"]
    cases = {("nothing.txt",): "nothing.txt is no text file", (str(tmp_path / "texts.txt"),): "dense is not MoEfied"}
    cases[("texts.txt", "--rounds", "0")] = "rounds must be positive"
    for flags, message in cases.items():
        monkeypatch.setattr(sys, "argv", [*given, *flags])
        with pytest.raises(SystemExit) as stopped:
            end_to_end.main()
        assert stopped.value.code == 2 and message in capsys.readouterr().err
