"""`moefy inspect` of models of all kinds, dense ones, composite ones and those that have experts already."""

import json
import sys
from pathlib import Path

import pytest
from tiny import convert

from moefy_hf import profile
from moefy_hf.cli.inspect_model import ranged
from moefy_hf.cli.main import main
from moefy_hf.errors import UnsupportedModel
from moefy_hf.hub.card_text import ffns_of
from moefy_hf.measure.made_up_inputs import made_up_batch
from moefy_hf.modeling.ffn_sites import find_sites
from moefy_hf.modeling.section import Section

sys.path.append(str(Path(__file__).parent / "registry"))
from tiny_registry import tiny_config, tiny_model  # noqa: E402


@pytest.fixture
def inspected(tmp_path, capsys):
    """A function that returns what is printed, and the JSON, of a tiny model's config; there are no weights."""

    def inspect(model_type: str):
        tiny_config(model_type).save_pretrained(tmp_path / model_type)
        arguments = ["inspect", str(tmp_path / model_type), "--head", "AutoModel"]
        capsys.readouterr()
        main(arguments)
        printed = capsys.readouterr().out
        main([*arguments, "--json"])
        return printed, json.loads(capsys.readouterr().out)

    return inspect


def test_a_dense_model(inspected):
    printed, found = inspected("moonshine")
    assert "MoonshineModel (moonshine)" in printed and "FFNs\ndense\n" in printed and "left alone" not in printed
    encoder = "| encoder.layers.*.mlp | 2 | 32 | 96 | no | gelu | up fc1, down fc2 |  |  | 8, 12, 16, 24, 32, 48 |"
    decoder = "| decoder.layers.*.mlp | 2 | 32 | 96 | yes | silu | up fc1, down fc2 (up first) |  |  |"
    assert encoder in printed and decoder in printed
    first = found["ffns"][0]
    assert first | {"expert_sizes": 0} == {
        "name": "encoder.layers.0.mlp", "tower": None, "hidden_size": 32, "neurons": 96, "gated": False,
        "activation": "gelu", "up": "fc1", "down": "fc2", "gate": None, "fused": None, "inner_dropout": None,
        "norm": None, "before": None, "expert_sizes": 0, "routed": False,
    }  # fmt: skip
    assert len(found["ffns"]) == 4 and found["left"] == []


def test_what_takes_neurons_together_and_drops_them(inspected):
    assert "| relu2 | gate gate_proj, up up_proj, down down_proj |  | ffn_sub_norm |" in inspected("bitnet")[0]
    assert "|  | _gaussian_topk |" in inspected("gemma3n_text")[0]
    assert "| up wi, down wo | dropout |  |" in inspected("t5")[0]


def test_a_mixture_of_experts(inspected):
    printed, found = inspected("mixtral")
    assert found["ffns"] == [] and "0% of them in 0 FFNs" in printed
    assert found["left"] == [
        {"modules": "layers.0-1.mlp.experts", "reason": "it is part of a native Mixture of Experts"}
    ]
    assert printed.endswith("left alone:\n- layers.0-1.mlp.experts: it is part of a native Mixture of Experts\n")


def test_a_composite_model(inspected):
    printed, found = inspected("clip")
    assert "towers: text, vision; moefy convert splits text, and others by --towers" in printed
    assert "| text | text_model.encoder.layers.*.mlp | 2 |" in printed
    assert "| vision | vision_model.encoder.layers.*.mlp | 2 |" in printed
    assert {ffn["tower"] for ffn in found["ffns"]} == {"text", "vision"}


def test_a_moefied_model_says_which_ffns_are_routed(tmp_path, capsys):
    model = tiny_model("clip")
    convert(model, 2, towers="text")
    model.save_pretrained(tmp_path / "moe")
    main(["inspect", str(tmp_path / "moe"), "--json"])
    found = json.loads(capsys.readouterr().out)
    assert {(ffn["tower"], ffn["routed"]) for ffn in found["ffns"]} == {("text", True), ("vision", False)}
    main(["inspect", str(tmp_path / "moe")])
    assert "MoEfied: 2 FFNs, random split" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model_type", "bertt"], "no model type 'bertt'; did you mean bert"),
        ([], "give a MODEL, or an architecture by --model_type"),
        (["bert", "--model_type", "bert"], "give a MODEL, or an architecture by --model_type"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["inspect", *arguments])
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_a_type_in_its_default_size(capsys):
    main(["inspect", "--model_type", "albert"])
    assert "AlbertModel (albert)" in capsys.readouterr().out


def test_numbers_in_words():
    assert [ranged(each) for each in ([0, 1, 2], [4], [0, 2, 5])] == ["0-2", "4", "0,2,5"]


def test_a_text_tower_without_ffns_is_said_so():
    model = tiny_model("aria")
    message = r"no FFN of the text tower of this AriaModel .* Mixture of Experts; towers that have some: 'vision'"
    with pytest.raises(UnsupportedModel, match=message):
        find_sites(model)
    assert len(find_sites(model, "vision")) > 0


def test_the_towers_that_are_profiled():
    model = tiny_model("clip")
    batch = made_up_batch(model)
    for towers in (None, "vision", ["text", "vision"]):
        with profile(model, [batch], towers=towers, sample=False, progress=False) as found:
            assert len(found.sites) == len(find_sites(model, towers))


@pytest.mark.parametrize(
    ("towers", "layers", "composite", "words"),
    [
        (None, None, False, "all its feed-forward networks"),
        (None, [0, 1], False, "2 of its feed-forward networks"),
        (None, None, True, "all feed-forward networks of its text tower"),
        (["text", "vision"], [1], True, "1 of the feed-forward networks of its text and vision towers"),
        ("all", None, True, "all its feed-forward networks"),
    ],
)
def test_a_card_names_towers(towers, layers, composite, words):
    section = Section.of_values({"towers": towers, "layers": layers})
    assert ffns_of({"text_config": {}} if composite else {}, section, None) == words
