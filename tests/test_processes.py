"""Two processes that share a conversion or a sweep come to what one does."""

import json
import re
import time
from pathlib import Path

import processes_run
import pytest
import torch
from launching import torchrun
from processes_run import CASES, HEADS, MOST, TOKENS
from safetensors.torch import load_file
from test_cli import number_tokenizer
from tiny import VOCAB, tiny_model

from moefy_hf.cli.main import main
from moefy_hf.measure.processes import ALONE


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """A folder with a model, its tokenizer, and texts."""
    folder = tmp_path_factory.mktemp("processes")
    tiny_model("llama", "AutoModelForCausalLM").save_pretrained(folder / "dense", max_shard_size="20KB")
    number_tokenizer().save_pretrained(folder / "dense")
    ids = torch.randint(3, VOCAB, (60, 12), generator=torch.Generator().manual_seed(0)).tolist()
    (folder / "texts.txt").write_text("\n".join(" ".join(map(str, row)) for row in ids))
    return folder


def conversion(dense: Path, output: str, *more: str) -> list[str]:
    settings = ["--expert_size", "8", "--k", "2", "--allocation", "uniform", "--calibration_tokens", "400", "--force"]
    return ["convert", str(dense / "dense"), str(dense / output), "--data", str(dense / "texts.txt"), *settings, *more]


def sweep(dense: Path, output: str) -> list[str]:
    figures = ["--k", "0.5", "--output", str(dense / f"{output}.json")]
    return ["sweep", str(dense / output), "--data", str(dense / "texts.txt"), *figures]


@pytest.fixture(scope="module")
def killed(dense):
    """A conversion whose second process is killed: how it ended, and after how many seconds."""
    done = torchrun("processes_run.py", "die", str(dense / "died"), *conversion(dense, "shared", "--offload", "yes"))
    return done, time.time() - float((dense / "died").read_text()), {path.name for path in dense.iterdir()}


@pytest.fixture(scope="module")
def shared(dense, killed):
    """What two processes found, when one of them had been killed before, and what they printed."""
    words = [*conversion(dense, "shared", "--offload", "yes"), "+", *sweep(dense, "shared")]
    done = torchrun("processes_run.py", "share", str(dense), *words)
    assert done.returncode == 0, done.stderr[-4000:]
    return torch.load(dense / "found.pt"), done


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return processes_run.found(tmp_path_factory.mktemp("alone") / "work", ALONE)


def test_a_conversion_ends_with_the_process_that_ends(killed):
    done, seconds, files = killed
    assert done.returncode and seconds < 60
    assert "shared" not in files and ".shared.work" in files  # which a rerun goes on with


@pytest.mark.parametrize("most", MOST)
@pytest.mark.parametrize("name", HEADS)
def test_the_same_tokens_count(name, most, shared, alone):
    result, expected = shared[0]["profile", name, most], alone["profile", name, most]
    assert result["kept"] == expected["kept"] == 3
    for (tokens, *sums, inputs), (its_tokens, *its_sums, its_inputs) in zip(
        result["sites"], expected["sites"], strict=True
    ):
        assert tokens == its_tokens == len(inputs) == min(most, processes_run.BATCHES * TOKENS)
        assert torch.equal(inputs, its_inputs)
        for each, its in zip(sums, its_sums, strict=True):
            torch.testing.assert_close(each, its, rtol=1e-12, atol=0)


def close(a, b):
    """Equal, but for the last digits of numbers."""
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert a.keys() == b.keys()
    if isinstance(a, dict | list | tuple):
        for each, other in zip(*((x.values() if isinstance(x, dict) else x) for x in (a, b)), strict=True):
            close(each, other)
    elif torch.is_tensor(a):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    elif isinstance(a, float):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-7)
    else:
        assert a == b


@pytest.mark.parametrize("case", CASES)
def test_a_conversion_and_a_sweep_are_those_of_one_process(case, shared, alone):
    result, expected = shared[0][case], alone[case]
    assert all(torch.equal(a, b) for a, b in zip(result["orders"], expected["orders"], strict=True))
    close(result, expected)


def test_processes_keep_their_layers_in_one_folder(shared, dense):
    names = {"conversion.json", *(f"{what}_{layer}.safetensors" for what in ("order", "router") for layer in (0, 1))}
    assert {path.name for path in (dense / "work").iterdir()} == names


def test_what_one_process_raises_all_raise(shared, alone):
    for case in ("bad batch", "nothing"):
        first, second = shared[0][case]
        assert [first] == [second] == alone[case]


def test_the_command_writes_and_prints_once(shared, dense, tmp_path):
    main(conversion(dense, "alone"))
    main(sweep(dense, "alone"))
    a, b = (load_file(dense / name / "model.safetensors") for name in ("shared", "alone"))
    close(a, b)
    a, b = (json.loads((dense / f"{name}.json").read_text()) for name in ("shared", "alone"))
    close(a, b)
    printed = shared[1].stdout
    assert len(re.findall(r"^\| FFN ", printed, re.M)) == len(re.findall(r"^\| router ", printed, re.M)) == 1
    assert not list(dense.glob(".*"))


def test_other_commands_run_in_one_process(dense, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    plan = ["convert", str(dense / "dense"), str(dense / "new"), "--data", "-"]
    for words, said in ((["inspect", str(dense / "dense")], "runs in one"), (plan, "standard input")):
        with pytest.raises(SystemExit, match="2"):
            main(words)
        assert said in capsys.readouterr().err
