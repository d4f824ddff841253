"""The `moefy` command on tiny checkpoints, in this process."""

import json
import re

import pytest
import torch
from tiny import tiny_inputs, tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from moefy_hf.cli import main

CAUSAL = "AutoModelForCausalLM"


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """A tiny Llama with a tokenizer of numbers, and texts."""
    folder = tmp_path_factory.mktemp("cli")
    tiny_model("llama-without-biases", CAUSAL).save_pretrained(folder / "dense")
    tokenizer = Tokenizer(models.WordLevel({str(number): number for number in range(99)}, unk_token="0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="2").save_pretrained(folder / "dense")
    ids = torch.randint(3, 99, (60, 12), generator=torch.Generator().manual_seed(0)).tolist()
    (folder / "texts.txt").write_text("\n".join(" ".join(map(str, row)) for row in ids))
    return folder


@pytest.fixture(scope="module")
def moe(dense):
    main(
        [
            "convert",
            str(dense / "dense"),
            str(dense / "moe"),
            "--texts",
            str(dense / "texts.txt"),
            "--expert_size",
            "8",
        ]
        + ["--k", "2", "--allocation", "uniform", "--calibration_tokens", "400"]
    )
    return dense / "moe"


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=tiny_inputs("llama", CAUSAL)["input_ids"]).logits


def test_inspect(dense, capsys):
    main(["inspect", str(dense / "dense")])
    out = capsys.readouterr().out
    assert (
        "LlamaForCausalLM (llama)" in out and "in 2 FFNs" in out and "| model.layers.1.mlp | 16 | 48 | yes | 8," in out
    )
    main(["inspect", str(dense / "dense"), "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["ffn_parameters"] == 2 * 3 * 16 * 48 and found["export"] == ["mixtral", "dense"]
    assert found["parameters"] == sum(p.numel() for p in tiny_model("llama-without-biases", CAUSAL).parameters())


def test_convert_leaves_a_checkpoint_that_loads(dense, moe, capsys):
    model = AutoModelForCausalLM.from_pretrained(moe, trust_remote_code=True)
    assert type(model).__name__ == "MoefiedLlamaForCausalLM"
    assert {site.act.selection.k for site in model.moe_sites()} == {2}
    assert AutoTokenizer.from_pretrained(moe).eos_token == "2"
    model.set_selection(k=1.0)
    torch.testing.assert_close(
        logits(model), logits(AutoModelForCausalLM.from_pretrained(dense / "dense")), rtol=1e-4, atol=1e-5
    )
    main(["inspect", str(moe)])
    assert "MoEfied: coactivation split, linear router" in capsys.readouterr().out
    assert not list(dense.glob(".*unfinished"))


def test_convert_without_data(dense, tmp_path, capsys):
    settings = ["--splitter", "parameter_clustering", "--router", "similarity", "--expert_size", "8", "--json"]
    main(["convert", str(dense / "dense"), str(tmp_path / "moe"), *settings])
    out = capsys.readouterr().out
    assert json.loads(out[out.index("{") :])["experts"] == [6, 6]
    assert (tmp_path / "moe" / "model.safetensors").exists()


def test_export(moe, tmp_path, capsys):
    main(["export", str(moe), str(tmp_path / "mixtral"), "--k", "3"])
    assert capsys.readouterr().out.strip() == str(tmp_path / "mixtral")
    model = AutoModelForCausalLM.from_pretrained(moe, trust_remote_code=True)
    model.set_selection(k=3)
    served = AutoModelForCausalLM.from_pretrained(tmp_path / "mixtral")
    assert type(served).__name__ == "MixtralForCausalLM" and served.config.num_experts_per_tok == 3
    assert (logits(model) - logits(served)).abs().max() <= 1e-4 * logits(model).abs().max()
    assert AutoTokenizer.from_pretrained(tmp_path / "mixtral").eos_token == "2"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inspect", "{tmp}/nothing"], "nothing"),
        (["convert", "{dense}", "{tmp}/out", "--expert_size", "8"], "calibration data is missing"),
        (["convert", "{dense}", "{tmp}/out", "--texts", "{tmp}/none.txt"], "none.txt is no text file"),
        (["convert", "{dense}", "{tmp}/out", "--texts", "{texts}", "--expert_size", "7"], "48 neurons.*size 7"),
        (
            ["convert", "{dense}", "{tmp}/out", "--texts", "{texts}", "--splitter", "x"],
            "unknown splitter 'x'",
        ),
        (["convert", "{dense}", "{tmp}/out", "--texts", "{texts}", "--k", "1.5"], "1.5"),
        (["convert", "{dense}", "{dense}"], "exists: choose another"),
        (["export", "{dense}", "{tmp}/out"], "is not MoEfied"),
        (["convert", "{dense}", "{tmp}/out", "--k", "abc"], "a share like 0.2 or a number of experts, got 'abc'"),
    ],
)
def test_bad_input_is_one_line_and_code_2(dense, tmp_path, arguments, message, capsys):
    places = {"tmp": str(tmp_path), "dense": str(dense / "dense"), "texts": str(dense / "texts.txt")}
    with pytest.raises(SystemExit) as stopped:
        main([each.format(**places) for each in arguments])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert re.search(message, error) and "Traceback" not in error
    assert error.startswith("usage: ") or error.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("arguments", [["--help"], ["convert", "--help"]])
def test_help_teaches(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert not stopped.value.code
    out = capsys.readouterr().out
    assert "moefy convert" in out and ("examples:" in out or "--splitter" in out)
