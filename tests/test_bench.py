"""`moefy bench` times what it has checked, and refuses what makes no sense."""

import csv
import itertools
import json
import re
import sys
import time

import pytest
import torch
from batches import text_batches
from tiny import DECODER, ENCODER, T5, convert, tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from moefy_hf import MoEficationConfig, moefy_
from moefy_hf.bench import PRESETS, Settings, bench_ffns, bench_model, end_to_end, ffns, layers, timing
from moefy_hf.bench import models as whole
from moefy_hf.bench import settings as module
from moefy_hf.cli.main import main
from moefy_hf.hub.card import model_card

LIMITS = {"bytes_per_second": 1e10, "flops_per_second": 1e11}


@pytest.fixture
def little(monkeypatch):
    monkeypatch.setattr(ffns, "COLD_BYTES", 10_000_000)
    monkeypatch.setattr(ffns, "machine_limits", lambda dtype: LIMITS)


@pytest.fixture
def tiny_presets(monkeypatch):
    llama = {**DECODER, "use_cache": True}
    monkeypatch.setitem(PRESETS, "tiny-llama", ("LlamaForCausalLM", "llama", llama))
    monkeypatch.setitem(PRESETS, "tiny-t5", ("T5ForConditionalGeneration", "t5", {**T5, "use_cache": True}))
    monkeypatch.setitem(PRESETS, "tiny-bert", ("BertModel", "bert", ENCODER))


@pytest.mark.parametrize("preset", ["minilm", "smollm2-135m"])
def test_rows_and_files(little, preset, tmp_path, capsys):
    files = {kind: tmp_path / f"bench.{kind}" for kind in ("json", "csv", "png")}
    sizes = ["--tokens", "1", "9", "--rounds", "6", "--expert_size", "16"]
    named = ["--output", str(files["json"]), str(files["csv"]), "--plot", str(files["png"])]
    main(["bench", "--preset", preset, *sizes, *named])
    found = json.loads(files["json"].read_text())
    settings, rows = found["settings"], found["rows"]
    assert settings["selection"] == "TopK(k=19)" and settings["expert_size"] == 16 and settings["share"] == 0.2
    assert settings["gated"] is (preset == "smollm2-135m") and settings["activation"] in (
        "GELUActivation",
        "SiLUActivation",
    )
    names = ["dense", "dense prepacked", "masked", "torch", "cpu"]
    if not timing.can_prepack(torch.float32):
        names.remove("dense prepacked")
    expected = [(name, 1) for name in names] + [(name, 9) for name in names if name != "torch"]  # masked beyond 4
    assert [(row["implementation"], row["tokens"]) for row in rows] == expected
    for row in rows:
        assert row["ratio"] > 0 and row["spread"][0] <= row["ratio"] <= row["spread"][1] and row["rounds"] == 6
        assert row["ratio_best_dense"] > 0 and row["best_dense"] in ("dense", "dense prepacked")
        least = max(row["bytes"] / 1e10, row["flops"] / 1e11)
        assert row["fraction_of_bound"] == pytest.approx(1e3 * least / row["milliseconds"])
    assert all(row["ratio"] == 1 for row in rows if row["implementation"] == "dense")
    with open(files["csv"], newline="") as file:
        lines = list(csv.DictReader(file))
    assert [float(line["spread_high"]) for line in lines] == [row["spread"][1] for row in rows]
    assert files["png"].read_bytes()[:4] == b"\x89PNG" and "| 9 | cpu | " in capsys.readouterr().out


@pytest.mark.parametrize("name", ffns.METHODS)
def test_what_computes_otherwise_is_not_timed(little, monkeypatch, name):
    right = ffns.METHODS[name]
    monkeypatch.setitem(ffns.METHODS, name, lambda layer, x: right(layer, x) * 1.001)
    with pytest.raises(RuntimeError, match=f"the output of '{name}' is not .* nothing was timed"):
        bench_ffns(Settings(preset="minilm", rounds=1), (1,), progress=False)


def test_least_work():
    """One token reads the selected rows and the router once, and of `down` what is not zero; many tokens read all."""
    with torch.no_grad():
        (layer,) = layers.preset_layers(Settings(preset="t5-base"), 0, nonzero=0.1)
        x, many = torch.randn(1, 768), torch.randn(1000, 768)
        keep = layer.site.act.keep(x).repeat_interleave(32, -1)
        active = int(((layer.weights.neurons(x) > 0) & keep).sum())
        assert 0 < active < 0.15 * 19 * 32
        found = ffns.least_work(layer, x, is_dense=False, skip_zeros=False)
        assert found == {"bytes": 4 * 768 * (19 * 32 + active + 96), "flops": 2 * 768 * (2 * 19 * 32 + 96)}
        assert ffns.least_work(layer, x, False, True)["flops"] == 2 * 768 * (19 * 32 + active + 96)
        assert ffns.least_work(layer, many, False, False) == {
            "bytes": 4 * 768 * (2 * 3072 + 96),
            "flops": 1000 * 2 * 768 * (2 * 19 * 32 + 96),
        }
        dense = {"bytes": 4 * 768 * 2 * 3072, "flops": 2 * 768 * 2 * 3072}
        assert ffns.least_work(layer, x, True, False) == dense
        share = float((layer.weights.neurons(many) > 0).float().mean())
        assert 0.07 < share <= 0.1
    row = {"bytes": 2_000_000, "flops": 10_000_000, "milliseconds": 0.4}
    expected = {"fraction_of_bound": 0.5, "bound": "bytes", "bound_milliseconds": 0.2}
    assert ffns.attained(row, LIMITS) == pytest.approx(expected)


def test_cold_weights_are_many_layers_and_warm_ones_a_single_one(little, monkeypatch):
    seen = []
    monkeypatch.setitem(ffns.METHODS, "masked", lambda layer, x: seen.append(id(layer)) or layers.masked(layer, x))
    settings = Settings(preset="minilm", rounds=4, implementations=("masked",))
    for cold, different in ((True, 3), (False, 1)):
        seen.clear()
        bench_ffns(settings, (1,), cold=cold, progress=False)
        assert len(set(seen[1:])) == different and len(seen) == 5  # one was the check


@pytest.mark.parametrize("router", ["linear", "mlp"])
def test_a_checkpoint_has_its_own_ffns(little, tmp_path, router, monkeypatch):
    monkeypatch.setattr(ffns, "COLD_BYTES", 0)
    model = tiny_model("llama-without-biases", "AutoModelForCausalLM")
    config = MoEficationConfig(expert_size=8, splitter="random", selection={"type": "top_k", "k": [1, 2]})
    config.router = "similarity"
    moefy_(model, config, progress=False)
    model.save_pretrained(tmp_path / "moe")
    if router == "mlp":
        section = json.loads((tmp_path / "moe" / "config.json").read_text())
        section["moefication"]["router"] = "mlp"  # without its weights: drawn at random
        (tmp_path / "moe" / "config.json").write_text(json.dumps(section))
    settings = Settings(checkpoint=str(tmp_path / "moe"), rounds=2)
    with torch.no_grad():
        found = layers.checkpoint_layers(settings, 0)
    for layer, site in zip(found, model.moe_sites(), strict=True):
        for path in ("up_proj", "down_proj", "gate_proj"):
            weight = site.owner.get_submodule(path).weight
            assert torch.equal(layer.site.owner.get_submodule(path).weight, weight)
        assert layer.kernel.routed is (router == "linear")
    described = bench_ffns(settings, (3,), progress=False)["settings"]
    assert described["layers"] == 2 and described["selection"] == ["TopK(k=1)", "TopK(k=2)"]
    assert described["expert_size"] == 8 and described["gated"] is True and "preset" in described
    one = bench_ffns(Settings(checkpoint=str(tmp_path / "moe"), rounds=2, share=0.5), (3,), progress=False)
    assert one["settings"]["selection"] == "TopK(k=3)"


def test_ffns_that_do_not_run_alone_are_refused(tmp_path):
    model = tiny_model("llama-without-biases", "AutoModelForCausalLM")
    selection = {"type": "top_k", "k": 2, "allocation": "uniform"}
    config = MoEficationConfig(expert_size=8, splitter="random", router="pre_gated", selection=selection)
    moefy_(model, config, text_batches(20, rows=8, length=16), progress=False)
    model.save_pretrained(tmp_path / "moe")
    with pytest.raises(ValueError, match="one router for all layers, so that none runs alone"):
        bench_ffns(Settings(checkpoint=str(tmp_path / "moe"), rounds=2), (3,), progress=False)


FORMS = ["bert", "gpt2", "opt", "phi3", "modernbert", "t5", "t5-gated"]
SETTINGS = {
    "top_k": {},
    "shared and compensated": {"shared_experts": 1, "compensation": True},
    "threshold": {"selection": {"type": "threshold", "tau": 0.5}},
}


@pytest.mark.parametrize("dtype", module.DTYPES)
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("name", FORMS)
def test_every_form_of_ffn(little, monkeypatch, tmp_path, name, settings, dtype):
    """Their outputs are checked, or nothing would be timed."""
    monkeypatch.setattr(ffns, "COLD_BYTES", 0)
    model = tiny_model(name, "AutoModelForSeq2SeqLM" if name.startswith("t5") else "AutoModel")
    batches = text_batches(6, labels="seq2seq" if name.startswith("t5") else None)
    selection = {"type": "top_k", "k": 2, "allocation": "uniform"}
    config = MoEficationConfig(expert_size=8, **({"selection": selection} | SETTINGS[settings]))
    moefy_(model, config, batches, progress=False)
    model.save_pretrained(tmp_path / "moe")
    given = Settings(checkpoint=str(tmp_path / "moe"), rounds=1, dtype=dtype)
    found = bench_ffns(given, (2, 40), progress=False)
    assert len(found["rows"]) == (9 if timing.can_prepack(module.DTYPES[dtype]) else 7)
    bench_model(given, batch=2, length=4, progress=False)


def test_turns():
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "abc"}
    taken = timing.take_turns(lambda turn: calls, 50, 60, "", progress=False)
    assert [len(each) for each in taken.values()] == [50] * 3 and list(taken) == ["a", "b", "c"]
    rounds = list(zip(*[iter(order)] * 3, strict=True))
    assert all(set(each) == set("abc") for each in rounds) and len(set(rounds)) == 6
    slow = timing.take_turns(lambda turn: {"a": lambda: time.sleep(0.01)}, 50, 0.02, "", progress=False)
    assert len(slow["a"]) == timing.LEAST
    assert timing.against([2, 4, 6, 8, 40], [1, 1, 1, 1, 1]) == {"ratio": 6, "spread": [4, 8]}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "t6"], "unknown preset 't6'; choose from minilm, bert-base, t5-base"),
        (["--dtype", "int8"], "unknown dtype 'int8'; choose from float32, bfloat16"),
        (["--implementations", "gpu"], "unknown implementation 'gpu'; choose from masked, torch, cpu"),
        (["--expert_size", "7"], "3072 neurons do not split into experts of size 7"),
        (["--k", "1.5"], r"share of experts \(--k\) must lie in \(0, 1\]"),
        (["--tokens", "0"], "tokens must be positive, got 0"),
        (["--threads", "0"], "threads must be positive, got 0"),
        (["--nonzero", "0.9"], r"nonzero must lie in \(0, 0.5\]"),
        (["--nonzero", "0.1", "--preset", "minilm"], "nonzero=0.1 wants an FFN of ReLU: that of minilm has gelu"),
        (["--output", "no/such/file.json"], "there is no folder for no/such/file.json"),
        (["--output", "."], r"\. cannot be written"),
        (["--output", "figures.xml"], "--output writes .json or .csv, got figures.xml"),
        (["--plot", "speed.xyz"], "--plot draws .png, .pdf, .svg, got speed.xyz"),
        (["no/such/checkpoint"], "no/such/checkpoint"),
        (["nothing-here", "--preset", "minilm"], "give a preset .* or a MoEfied checkpoint"),
        (["--implementations", "auto"], "implementation 'auto' is for whole models"),
        (["--router", "mlp"], "unknown router 'mlp'; choose from linear"),
        (["nothing-here", "--router", "linear"], "expert sizes and routers are for presets"),
        (["nothing-here", "--expert_size", "8"], "expert sizes and routers are for presets"),
        (["--generate", "128", "32", "--tokens", "1"], "--tokens is for FFNs alone"),
        (["--generate", "0", "32"], "batch, length and new tokens must be positive"),
        (["--generate", "8", "0"], "--generate at least one token"),
        (["--generate", "8", "2", "--preset", "minilm"], "BertModel is no language model"),
        (["--generate", "2040", "20", "--preset", "opt-1.3b"], "2040 and 20 new tokens are more than the 2048"),
        (["--generate", "8", "2", "--expert_size", "7"], "3072 neurons do not split into experts of size 7"),
    ],
)
def test_bad_input(arguments, message, capsys, monkeypatch):
    monkeypatch.setattr(ffns, "machine_limits", lambda dtype: pytest.fail("this is work"))
    monkeypatch.setattr(whole.PreTrainedModel, "_from_config", lambda *args, **kwargs: pytest.fail("this is work"))
    with pytest.raises(SystemExit) as stopped:
        main(["bench", *arguments])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert re.search(message, error) and "Traceback" not in error


def test_without_a_compiler_or_matplotlib(monkeypatch, capsys, tmp_path):
    def no_library():
        raise module.BuildError("there is no C++ compiler")

    monkeypatch.setattr(module, "library", no_library)
    monkeypatch.setattr("moefy_hf.io.find_spec", lambda name: None)
    cases = {"no C++ compiler": [], "--plot needs matplotlib": ["--plot", str(tmp_path / "a.png")]}
    for message, arguments in cases.items():
        with pytest.raises(SystemExit) as stopped:
            main(["bench", *arguments])
        assert stopped.value.code == 2 and message in capsys.readouterr().err
    assert Settings(preset="minilm", implementations=("masked", "torch"))


@pytest.mark.parametrize(
    ("preset", "new_tokens"), [("tiny-llama", 3), ("tiny-t5", 3), ("tiny-t5", 0), ("tiny-bert", 0)]
)
def test_whole_models(tiny_presets, preset, new_tokens):
    settings = Settings(preset=preset, expert_size=8, rounds=2, share=0.34)
    found = bench_model(settings, batch=2, length=5, new_tokens=new_tokens, progress=False)
    assert [row["implementation"] for row in found["rows"]] == ["dense", "masked", "torch", "cpu"]
    assert all(row["ratio"] > 0 and row["tokens"] == 10 and row["rounds"] == 2 for row in found["rows"])
    assert found["settings"]["selection"]["k"] == 0.34 and found["settings"]["new_tokens"] == new_tokens


def test_variants_share_weights_and_agree(tiny_presets):
    settings = Settings(preset="tiny-llama", expert_size=8, share=0.34)
    with torch.no_grad():
        dense, model = whole.preset_models(settings)
        found = whole.variants(model, ("masked", "torch", "cpu"))
        ids = torch.randint(3, 99, (1, 4), generator=torch.Generator().manual_seed(0))
        logits = [each(input_ids=ids).logits for each in found.values()]
        all_experts = dense(input_ids=ids).logits
        for one, other in itertools.combinations(logits, 2):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(logits[0], all_experts, rtol=1e-2, atol=1e-3)
        model.set_selection(k=1.0)
        torch.testing.assert_close(model(input_ids=ids).logits, all_experts, rtol=1e-4, atol=1e-5)
    own = {name for name, param in found["cpu"].named_parameters() if param is not model.get_parameter(name)}
    assert own == {f"model.layers.{layer}.mlp.down_proj.weight" for layer in range(2)}
    with torch.no_grad():
        found["cpu"].moe_sites()[1].down.weight.mul_(1.01)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    model.set_selection(k=0.34, allocation="uniform")
    with pytest.raises(RuntimeError, match=r"model.layers.1.mlp: 'cpu' is 1.0% off"):
        whole.check({"cpu": found["cpu"]}, model, batch)


@pytest.fixture
def moe(tmp_path):
    """A tiny checkpoint with a tokenizer, and texts."""
    model = tiny_model("llama-without-biases", "AutoModelForCausalLM")
    convert(model, 2)
    model.save_pretrained(tmp_path / "moe")
    words = Tokenizer(models.WordLevel({f"w{number}": number for number in range(99)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w2").save_pretrained(tmp_path / "moe")
    (tmp_path / "texts.txt").write_text("\n".join(f"w{n} w{n + 1} w{n + 2}" for n in range(5, 15)))
    return tmp_path / "moe"


def test_a_whole_checkpoint_on_the_command_line(moe, tmp_path, capsys):
    given = ["--rounds", "2", "--implementations", "cpu", "--output", str(tmp_path / "out.json")]
    main(["bench", str(moe), "--generate", "4", "3", *given])
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert [row["implementation"] for row in rows] == ["dense", "cpu"] and "| 4 | cpu |" in capsys.readouterr().out
    main(["bench", str(moe), "--batches", "2", "5", *given])
    assert {row["tokens"] for row in json.loads((tmp_path / "out.json").read_text())["rows"]} == {10}


@pytest.mark.parametrize("new_tokens", [0, 3])
def test_end_to_end(new_tokens, moe, tmp_path, monkeypatch, capsys):
    given = [str(moe), "--data", str(tmp_path / "texts.txt"), "--rounds", "3", "--batch", "2"]
    flags = ["--new_tokens", str(new_tokens), "--output", str(tmp_path / "out.csv"), "--facts"]
    monkeypatch.setattr(sys, "argv", ["end_to_end", *given, *flags])
    end_to_end.main()
    with open(tmp_path / "out.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["implementation"] for row in rows] == ["dense", "masked", "cpu", "auto"]
    assert float(rows[0]["times_dense"]) == 1 and all(float(row["times_dense"]) > 0 for row in rows)
    assert {(row["tokens"], row["new_tokens"], row["rounds"], row["share"]) for row in rows} == {
        ("6", str(new_tokens), "3", "0.333")
    }
    card = str(model_card(moe))
    assert "## Speed" in card and "| implementation | times_dense |" in card and "| cpu | " in card


def test_bad_input_end_to_end(tmp_path, monkeypatch, capsys):
    tiny_model("llama", "AutoModelForCausalLM").save_pretrained(tmp_path / "dense")
    (tmp_path / "texts.txt").write_text("w1 w2")
    given = ["end_to_end", str(tmp_path / "dense"), "--data"]
    cases = {("nothing.txt",): "nothing.txt is no file", (str(tmp_path / "texts.txt"),): "dense is not MoEfied"}
    cases[("texts.txt", "--rounds", "0")] = "rounds must be positive"
    for flags, message in cases.items():
        monkeypatch.setattr(sys, "argv", [*given, *flags])
        with pytest.raises(SystemExit) as stopped:
            end_to_end.main()
        assert stopped.value.code == 2 and message in capsys.readouterr().err
