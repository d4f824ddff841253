"""The `moefy` command on tiny checkpoints, in this process."""

import argparse
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from tiny import convert, tiny_inputs, tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from moefy_hf import MoEficationConfig, Sweep
from moefy_hf.cli import convert as convert_command
from moefy_hf.cli.main import COMMANDS, main, parser, renamed
from moefy_hf.data import Texts, TextSource
from moefy_hf.hub.facts import read_facts
from moefy_hf.loading import load
from moefy_hf.measure.sparsity import LEVELS

CAUSAL = "AutoModelForCausalLM"


def number_tokenizer() -> PreTrainedTokenizerFast:
    """Writes each number as the token of that id."""
    words = {"[END]" if number == 2 else str(number): number for number in range(99)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="[END]")


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """A tiny Llama with a tokenizer of numbers, and texts."""
    folder = tmp_path_factory.mktemp("cli")
    tiny_model("llama-without-biases", CAUSAL).save_pretrained(folder / "dense")
    number_tokenizer().save_pretrained(folder / "dense")
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
            "--data",
            str(dense / "texts.txt"),
            "--expert_size",
            "8",
        ]
        + ["--k", "2", "--allocation", "uniform", "--calibration_tokens", "400"]
    )
    return dense / "moe"


@pytest.fixture
def copy(moe, tmp_path):
    return shutil.copytree(moe, tmp_path / "moe")


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=tiny_inputs("llama", CAUSAL)["input_ids"]).logits


def test_inspect(dense, capsys):
    main(["inspect", str(dense / "dense")])
    out = capsys.readouterr().out
    assert (
        "LlamaForCausalLM (llama)" in out
        and "in 2 FFNs" in out
        and "| model.layers.*.mlp | 2 | 16 | 48 | yes |" in out
    )
    main(["inspect", str(dense / "dense"), "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["ffn_parameters"] == 2 * 3 * 16 * 48 and found["export"] == [
        "granitemoe",
        "mixtral",
        "onnx",
        "gguf",
        "dense",
    ]
    assert found["parameters"] == sum(p.numel() for p in tiny_model("llama-without-biases", CAUSAL).parameters())


def test_convert_leaves_a_checkpoint_that_loads(dense, moe, capsys):
    model = AutoModelForCausalLM.from_pretrained(moe, trust_remote_code=True)
    assert type(model).__name__ == "MoefiedLlamaForCausalLM"
    assert {site.act.selection.k for site in model.moe_sites()} == {2}
    assert AutoTokenizer.from_pretrained(moe).eos_token == "[END]"
    model.set_selection(k=1.0)
    torch.testing.assert_close(
        logits(model), logits(AutoModelForCausalLM.from_pretrained(dense / "dense")), rtol=1e-4, atol=1e-5
    )
    main(["inspect", str(moe)])
    assert "MoEfied: 2 FFNs, coactivation split, linear router" in capsys.readouterr().out
    assert not list(dense.glob(".*unfinished"))


def test_interrupted_conversion_leaves_nothing(dense, tmp_path, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(convert_command, "add_facts", interrupted)  # when the weights are written
    settings = ["--splitter", "parameter_clustering", "--router", "similarity", "--expert_size", "8"]
    with pytest.raises(KeyboardInterrupt):
        main(["convert", str(dense / "dense"), str(tmp_path / "moe"), *settings])
    assert not list(tmp_path.iterdir())


def test_convert_with_all_settings(dense, tmp_path):
    settings = [
        "--expert_size",
        "8",
        "--k",
        "0.5",
        "--selection",
        "threshold",
        "--shared_experts",
        "1",
        "--compensation",
    ]
    texts = ["--data", str(dense / "texts.txt"), "--calibration_tokens", "400", "--allocation", "global", "--force"]
    main(["convert", str(dense / "dense"), str(tmp_path / "moe"), *texts, *settings])
    section = load(tmp_path / "moe").config.moefication
    assert section["selection"] == {"type": "threshold", "k": 0.5, "allocation": "global"}
    assert (section["shared_experts"], section["compensation"]) == (1, True)
    assert 0 < read_facts(tmp_path / "moe")["prediction"]["kl"] < 1


def test_convert_with_a_router_of_ones_own_size(dense, tmp_path, capsys):
    settings = ["--router", "low_rank", "--expert_size", "8", "--force", "--data", str(dense / "texts.txt")]
    folder = str(tmp_path / "moe")
    for given, message in (("rank", "a setting and a number like rank=64"), ("inputs=0.3", "choose from rank")):
        with pytest.raises(SystemExit) as error:
            main(["convert", str(dense / "dense"), folder, *settings, "--router_settings", given])
        assert error.value.code == 2 and message in capsys.readouterr().err
    main(["convert", str(dense / "dense"), folder, *settings, "--router_settings", "rank=3"])
    model = load(folder)
    assert model.config.moefication["router_settings"] == {"rank": 3}
    assert all(len(site.act.router.proj_in) == 3 for site in model.moe_sites())
    capsys.readouterr()
    main(["inspect", folder])
    assert "split, low_rank router (rank 3), " in capsys.readouterr().out
    main(["card", folder])
    assert "| router | `low_rank` (rank 3) |" in (tmp_path / "moe" / "README.md").read_text()


def test_convert_with_budgets_by_angles(dense, tmp_path):
    settings = ["--expert_size", "8", "--k", "0.5", "--allocation", "angular", "--force"]
    texts = ["--data", str(dense / "texts.txt"), "--calibration_tokens", "400"]
    main(["convert", str(dense / "dense"), str(tmp_path / "moe"), *texts, *settings])
    model = load(tmp_path / "moe")
    assert model.config.moefication["selection"] == {"type": "top_k", "k": 0.5, "allocation": "angular"}
    assert len(model.config.moefication["angular"]["distance"]) == 2
    assert sum(site.act.selection.k for site in model.moe_sites()) == 6


def test_convert_with_a_file_that_a_recipe_reads(dense, tmp_path, capsys):
    file = Path(__file__).parents[1] / "recipes" / "configs" / "smollm2" / "cmoe.yaml"
    settings = ["--config", str(file), "--data", str(dense / "texts.txt"), "--calibration_tokens", "400", "--force"]
    main(["convert", str(dense / "dense"), str(tmp_path / "moe"), *settings, "--shared_experts", "1", "--k", "0.5"])
    section = load(tmp_path / "moe").config.moefication
    assert (section["splitter"], section["router"], section["expert_size"]) == ("activation_markers", "analytic", 8)
    assert (section["shared_experts"], section["calibration_tokens"]) == (1, 400)  # the command line wins
    assert section["selection"] == {"type": "top_k", "k": 0.5, "allocation": "uniform"}
    assert load(dense / "dense").config.model_type == "llama"


def test_a_file_of_settings(dense, tmp_path, capsys):
    file = tmp_path / "settings.yaml"
    file.write_text("router: low_rank\nrouter_settings: {rank: 3}\nexpert_size: 8\nlayers: [1]\ncompensation: true\n")
    texts = ["--data", str(dense / "texts.txt"), "--force"]
    main(["convert", str(dense / "dense"), str(tmp_path / "moe"), "--config", str(file), *texts])
    section = load(tmp_path / "moe").config.moefication
    assert (section["router_settings"], section["layers"], section["compensation"]) == ({"rank": 3}, [1], True)
    for content, message in (
        ("experts: 8\n", "unknown settings experts; choose from expert_size"),
        ("- 8\n", "NAME: VALUE"),
    ):
        file.write_text(content)
        with pytest.raises(SystemExit) as stopped:
            main(["convert", str(dense / "dense"), str(tmp_path / "other"), "--config", str(file), *texts])
        assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_flags_of_version_0_1_still_work_and_say_so(dense, copy, capsys):
    old = ["--texts", str(dense / "texts.txt"), "--shares=0.5", "--controls", "--json"]
    main(["sweep", str(copy), *old])
    out, error = capsys.readouterr()
    assert [row.get("k") for row in json.loads(out[out.index("{") :])["rows"]] == [None, 0.5]
    assert "moefy: --texts is --data now\nmoefy: --shares is --k now\n" in error
    assert renamed(["bench", "--csv", "a.csv", "--expert-size=8"]) == ["bench", "--output", "a.csv", "--expert_size=8"]


def test_convert_without_data(dense, tmp_path, capsys):
    settings = ["--splitter", "parameter_clustering", "--router", "similarity", "--expert_size", "8", "--json"]
    main(["convert", str(dense / "dense"), str(tmp_path / "moe"), *settings])
    out = capsys.readouterr().out
    assert json.loads(out[out.index("{") :])["experts"] == [6, 6]
    assert (tmp_path / "moe" / "model.safetensors").exists()
    assert AutoTokenizer.from_pretrained(tmp_path / "moe").pad_token is None  # as it came


def test_profile(dense, capsys):
    texts = ["--data", str(dense / "texts.txt"), "--calibration_tokens", "200"]
    main(["profile", str(dense / "dense"), *texts, "--json"])
    out = capsys.readouterr().out
    found = json.loads(out[out.index("{") :])
    assert found["tokens"] == 200 and [row["ffn"] for row in found["rows"]] == [
        "model.layers.0.mlp",
        "model.layers.1.mlp",
    ]
    for row in found["rows"]:  # SiLU of noise: half of the activations are positive, and none is zero
        assert row["neurons"] == 48 and 0.3 < row["not_active"] < 0.7 and 0.02 < row["half_of_the_mass"] < 0.5
        shares = [row[f"active_at_{level}"] for level in LEVELS]
        assert row["zero"] == 0 and 1 > shares[0] and shares == sorted(shares, reverse=True) and shares[-1] > 0.1
    main(["profile", str(dense / "dense"), *texts, "--ppl", "1"])
    out = capsys.readouterr().out
    assert "| model.layers.1.mlp | 48 | " in out and "perplexity grows by " in out


def test_sweep_with_neuron_level_baselines(dense, copy, capsys):
    texts = ["--data", str(dense / "texts.txt"), "--k", "3", "--controls", "wina", "cats", "--json"]
    main(["sweep", str(copy), *texts, "--calibration", str(dense / "texts.txt")])
    out = capsys.readouterr().out
    rows = json.loads(out[out.index("{") :])["rows"]
    assert [row["router"] for row in rows] == ["dense", "own", "wina", "cats"]
    assert all(row["ffn_flops"] == pytest.approx(0.5, abs=0.03) for row in rows[2:])


def test_sweep_a_language_model(dense, copy, tmp_path, capsys):
    figures, plot = tmp_path / "figures.json", tmp_path / "plot.png"
    texts = ["--data", str(dense / "texts.txt"), "--k", "2", "1.0", "--controls", "oracle"]
    main(["sweep", str(copy), *texts, "--output", str(figures), "--plot", str(plot)])
    out = capsys.readouterr().out
    assert "| own | top_k | uniform | 100.0% |" in out and "| oracle |" in out and "perplexity" in out
    sweep = Sweep.load(figures)
    assert sweep.facts["quality"] == "perplexity"
    assert [row["router"] for row in sweep.rows] == ["dense", "own", "own", "oracle", "oracle"]
    model, lines = load(dense / "dense").eval(), (dense / "texts.txt").read_text().splitlines()
    ids = torch.tensor([list(map(int, line.split())) for line in lines])
    with torch.no_grad():
        loss = model(input_ids=ids, labels=ids).loss
    assert sweep.rows[0]["loss"] == pytest.approx(float(loss), rel=1e-4)
    assert plot.read_bytes()[:4] == b"\x89PNG"
    facts = read_facts(copy)
    assert facts["sweep"] == sweep.to_dict() and facts["evaluation"] == {"data": "texts.txt"}
    assert facts["calibration"] == {"data": "texts.txt"} and facts["conversion"]["experts"] == [6, 6]


def test_sweep_at_flops_and_with_other_selections(dense, copy, capsys):
    texts = ["--data", str(dense / "texts.txt"), "--controls", "--json"]
    kinds = ["--selections", "top_k", "level", "--calibration", str(dense / "texts.txt")]
    main(["sweep", str(copy), *texts, "--flops", "0.6", "0.8", *kinds])
    out = capsys.readouterr().out
    rows = json.loads(out[out.index("{") :])["rows"]
    assert [row.get("type") for row in rows] == [None, "top_k", "top_k", "level", "level"]
    assert all(0.4 < row["ffn_flops"] <= 0.6 for row in rows[1::2]) and 0.6 < rows[2]["ffn_flops"] <= 0.8
    with pytest.raises(SystemExit):
        main(["sweep", str(copy), *texts, "--selections", "level"])
    assert "what level compute is measured on other texts" in capsys.readouterr().err


def test_sweep_of_a_model_with_a_setting(dense, copy, capsys):
    model = load(copy)
    model.set_selection(type="level", level=1.8)
    model.save_pretrained(copy)
    main(["sweep", str(copy), "--data", str(dense / "texts.txt"), "--k", "0.5", "--controls", "oracle", "--json"])
    out = capsys.readouterr().out
    rows = json.loads(out[out.index("{") :])["rows"]
    assert [(row["router"], row.get("type"), row.get("k")) for row in rows[1:]] == [
        ("oracle", "top_k", 0.5),
        ("own", "level", None),
    ]
    assert rows[2]["level"] == 1.8 and 0 < rows[2]["experts"] < 1


def test_sweep_for_a_quality(dense, copy, tmp_path, capsys):
    figures = tmp_path / "figures.json"
    texts = ["--data", str(dense / "texts.txt"), "--output", str(figures)]
    main(["sweep", str(copy), *texts, "--quality", "1.0005"])
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith("1.0005 of dense: model.set_selection(type='top_k', k=")
    found = json.loads(figures.read_text())
    k = found["facts"]["target"]["selection"]["k"]
    assert f"k={k!r}" in line
    assert all((row["relative_quality"] <= 1.0005) == (row["k"] >= k) for row in found["rows"][1:])
    assert "sweep" not in read_facts(copy)  # a search is no curve
    with pytest.raises(SystemExit):
        main(["sweep", str(copy), *texts, "--quality", "0.9"])
    assert "perplexity of 0.9 of dense is no target: it must be 1 or more" in capsys.readouterr().err


def test_sweep_a_classifier(tmp_path, capsys):
    model = tiny_model("bert", "AutoModelForSequenceClassification", id2label={0: "no", 1: "yes"})
    convert(model, k=2)
    model.save_pretrained(tmp_path / "moe")
    number_tokenizer().save_pretrained(tmp_path / "moe")
    rows = [(f"{n} {n + 1}", ["no", "yes"][n % 2]) for n in range(3, 40)]
    (tmp_path / "test.csv").write_text("text,label\n" + "\n".join(f"{text},{label}" for text, label in rows))
    main(["sweep", str(tmp_path / "moe"), "--data", str(tmp_path / "test.csv"), "--k", "2", "--json"])
    out = capsys.readouterr().out
    dense = json.loads(out[out.index("{") :])["rows"][0]
    model.set_selection(k=1.0)
    right = 0
    for text, label in rows:
        with torch.no_grad():
            logits = model.eval()(input_ids=torch.tensor([list(map(int, text.split()))])).logits
        right += model.config.id2label[int(logits.argmax())] == label
    assert dense["accuracy"] == pytest.approx(right / len(rows))


def test_labels_of_a_csv_file(tmp_path):
    model = tiny_model("bert", "AutoModelForSequenceClassification", id2label={0: "1", 1: "2", 2: "None"})
    file = tmp_path / "rows.csv"

    def read() -> Texts:
        return TextSource(str(file)).open().read(model, labels=True)

    file.write_text('text,label\n"a, b",1\nc,2\nd,None\ne,0\n')  # names first; 0 is only an id
    assert read() == Texts(["a, b", "c", "d", "e"], labels=[0, 1, 2, 0])
    file.write_text("text,label\n" + "long " * 30_000 + ",2\n")
    assert read().labels == [1]
    file.write_text("text,topic\na,1\n")
    assert read().labels is None
    file.write_text("text,label\na,9\n")
    with pytest.raises(ValueError, match="row 1 has label '9', which is none of 1, 2, None"):
        read()


def test_card(copy, capsys):
    main(["card", str(copy), "--repo_id", "me/smol-moe", "--license", "mit"])
    assert capsys.readouterr().out.strip() == str(copy / "README.md")
    card = ModelCard.load(copy / "README.md")
    assert card.data.license == "mit" and card.data.pipeline_tag == "text-generation"
    assert 'AutoModelForCausalLM.from_pretrained("me/smol-moe"' in card.text and "400 tokens of texts.txt" in card.text
    (copy / "README.md").write_text("mine")
    with pytest.raises(SystemExit):
        main(["card", str(copy)])
    assert (copy / "README.md").read_text() == "mine" and "--overwrite" in capsys.readouterr().err
    main(["card", str(copy), "--overwrite"])
    assert "| router | `linear` |" in (copy / "README.md").read_text()


@pytest.mark.parametrize("data", [False, True])
def test_export_to_onnx(data, dense, tmp_path, capsys):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = tiny_model("bert", "AutoModelForSequenceClassification", hidden_act="relu", num_hidden_layers=1)
    convert(model, 2)
    model.save_pretrained(tmp_path / "bert")
    number_tokenizer().save_pretrained(tmp_path / "bert")
    texts = ["--data", str(dense / "texts.txt"), "--no_timing"] if data else []
    main(["export", str(tmp_path / "bert"), str(tmp_path / "out"), "--to", "onnx", "--k", "3", *texts])
    printed = capsys.readouterr().out
    assert "1 FFNs as MoE" in printed and ("times as fast as dense: one text" in printed) == (not data)
    assert {"model.onnx", "config.json", "tokenizer.json"} <= {path.name for path in (tmp_path / "out").iterdir()}
    facts = json.loads((tmp_path / "out" / "moefy_onnx.json").read_text())
    assert facts["largest_difference"] <= 1e-5 and ("times_dense" in facts) == (not data)


def test_export(moe, tmp_path, capsys):
    main(["export", str(moe), str(tmp_path / "mixtral"), "--k", "3", "--to", "mixtral"])
    assert capsys.readouterr().out.strip() == str(tmp_path / "mixtral")
    model = AutoModelForCausalLM.from_pretrained(moe, trust_remote_code=True)
    model.set_selection(k=3)
    served = AutoModelForCausalLM.from_pretrained(tmp_path / "mixtral")
    assert type(served).__name__ == "MixtralForCausalLM" and served.config.num_experts_per_tok == 3
    assert (logits(model) - logits(served)).abs().max() <= 1e-4 * logits(model).abs().max()
    assert AutoTokenizer.from_pretrained(tmp_path / "mixtral").eos_token == "[END]"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inspect", "{tmp}/nothing"], "nothing"),
        (["convert", "{dense}", "{tmp}/out", "--expert_size", "8"], "calibration data is missing"),
        (["convert", "{dense}", "{tmp}/out", "--data", "{tmp}/none.txt"], "none.txt is no file"),
        (["convert", "{dense}", "{tmp}/out", "--data", "{texts}", "--expert_size", "7"], "48 neurons.*size 7"),
        (
            ["convert", "{dense}", "{tmp}/out", "--data", "{texts}", "--splitter", "x"],
            "unknown splitter 'x'",
        ),
        (["convert", "{dense}", "{tmp}/out", "--data", "{texts}", "--k", "1.5"], "1.5"),
        (["convert", "{dense}", "{dense}"], "exists: choose another"),
        (["export", "{dense}", "{tmp}/out"], "is not MoEfied"),
        (["profile", "{dense}", "--data", "{tmp}/none.txt"], "none.txt is no file"),
        (["sweep", "{dense}", "--data", "{texts}"], "is not MoEfied: moefy convert"),
        (["sweep", "{dense}"], "required: --data"),
        (["convert", "{dense}", "{tmp}/out", "--config", "{tmp}/none.yaml"], "there is no such file"),
        (["export", "{dense}", "{dense}"], "exists: choose another"),
        (["export", "{dense}", "{tmp}/out", "--to", "dense", "--int8"], "belong to --to onnx"),
        (["sweep", "{dense}", "--data", "{texts}", "--output", "{tmp}/no/a.json"], "there is no folder for .*a.json"),
        (["sweep", "{dense}", "--data", "{texts}", "--controls", "x"], "'x'"),
        (["sweep", "{dense}", "--data", "{texts}", "--controls", "teal"], "give --calibration$"),
        (["profile", "{dense}", "--data", "{texts}", "--ppl", "0"], "--ppl is a growth in percent"),
        (["profile", "{dense}", "--data", "{texts}", "--max_length", "0"], "a whole number from 1, got '0'"),
        (["convert", "{dense}", "{tmp}/out", "--calibration_tokens", "many"], "a whole number from 1, got 'many'"),
        (["bench", "--preset", "minilm", "--seconds", "0"], "seconds must be positive, got 0"),
        (["card", "{dense}"], "is not MoEfied"),
        (["card", "{tmp}/nothing"], "no config.json"),
        (["push", "{dense}", "me/moe"], "is not MoEfied"),
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


HELP = [
    ([], "moefy bench --preset"),
    (["convert"], "--data"),
    (["sweep"], "--data"),
    (["bench"], "--generate PROMPT NEW"),
]


@pytest.mark.parametrize(("words", "taught"), [*HELP, (["kernels"], "info|build"), (["kernels", "build"], "--force")])
def test_help_teaches(words, taught, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([*words, "--help"])
    assert not stopped.value.code and taught in capsys.readouterr().out


@pytest.mark.parametrize("name", COMMANDS)
def test_flags_mean_the_same_in_every_command(name):
    """Words are joined by underscores; --json prints; --data, --output and --k name files and budgets."""
    commands = next(a for a in parser([name])._actions if isinstance(a, argparse._SubParsersAction))
    actions = {flag: action for action in commands.choices[name]._actions for flag in action.option_strings}
    assert not [flag for flag in actions if "-" in flag.lstrip("-")]
    if name not in ("kernels", "train"):  # train reads it among the settings of a task
        assert isinstance(actions["--json"], argparse._StoreTrueAction)
    for flag in ("--data", "--calibration", "--output"):
        assert flag not in actions or actions[flag].type is None
    if "--k" in actions:
        assert actions["--k"].type("0.25") == 0.25
    places = [action.dest for action in commands.choices[name]._actions if not action.option_strings]
    assert places[:1] == {"kernels": ["word"], "env": [], "train": ["task"]}.get(name, ["model"])
    assert "output" not in places or places[-1] == "output"


def test_the_command_line_overrules_a_file(tmp_path):
    (tmp_path / "settings.yaml").write_text("num_experts: 4\nselection: threshold\nthreshold: 0.9\nlayers: []\n")
    words = ["convert", "--compensation", "model", "output", "--config", str(tmp_path / "settings.yaml")]
    args = parser(words).parse_args([*words, "--expert_size", "8", "--k", "0.3"])
    config = convert_command.config_of(args)
    assert (config.num_experts, config.expert_size, config.compensation) == (None, 8, True)
    assert config.section()["selection"] == {"type": "threshold", "k": 0.3}


def test_defaults_are_those_of_the_config():
    args = parser(["convert"]).parse_args(["convert", "model", "output"])
    assert convert_command.config_of(args) == MoEficationConfig()
