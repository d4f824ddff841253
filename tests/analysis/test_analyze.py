"""What is planted is found, nothing else is said, and the model comes back as it was."""

import json
import pickle

import numpy as np
import pytest
import torch
from planted import CLASS, EXPERT, LAYER, TOKEN, number_tokenizer, planted_model, write_texts
from tiny import convert, distance, run, tiny_inputs, tiny_model

from moefy_hf import MoEficationConfig
from moefy_hf.analysis import Analysis, TextStream, analyze
from moefy_hf.analysis.measuring import measure, measure_load, survey_texts
from moefy_hf.conversion.pipeline import install_routers_
from moefy_hf.data import TextSource


def stream(path: str, model, **settings) -> TextStream:
    rows = TextSource(path).open().rows(model, labels=True)
    return TextStream(rows, number_tokenizer(), **{"max_length": 16, "batch_size": 8, **settings})


@pytest.fixture(scope="module")
def model():
    return planted_model()


@pytest.fixture(scope="module")
def found(model, tmp_path_factory):
    path = write_texts(tmp_path_factory.mktemp("planted") / "texts.csv", 900)
    before = run(model, tiny_inputs("bert")), json.dumps(model.config.moefication)
    result = analyze(model, number_tokenizer(), stream(path, model), progress=False)
    assert distance(before[0], run(model, tiny_inputs("bert"))) == 0  # all as it was
    assert before[1] == json.dumps(model.config.moefication)
    return result


def test_the_planted_expert_is_found(found):
    expert = found.layers[LAYER]["experts"][EXPERT]
    tokens = {token["name"]: token["times"] for token in expert["token"]}
    assert tokens[str(TOKEN)] > 2
    assert expert["class"][0]["name"] == f"LABEL_{CLASS}"
    others = [each for i, each in enumerate(found.layers[LAYER]["experts"]) if i != EXPERT]
    assert all(str(TOKEN) not in [token["name"] for token in each["token"]] for each in others)


def test_what_it_uses_is_marked_in_its_examples(found):
    examples = found.layers[LAYER]["experts"][EXPERT]["examples"]
    assert len(examples) == 3
    marked = [token for text in examples for token, used in text if used]
    assert marked.count(str(TOKEN)) > 0.7 * len(marked)


def test_shuffled_classes_find_nothing(found):
    for row in found.specialisation:
        assert row["experts with a shuffled class"] == 0
        assert abs(row["variance that shuffled classes explain"]) < 0.01
    routed = found.specialisation[0]
    assert routed["experts with a class"] > 0 and routed["variance that classes explain"] > 0.02


def test_labels_that_mean_nothing_find_nothing(model, tmp_path):
    path = write_texts(tmp_path / "texts.csv", 900, related=False, seed=7)
    result = analyze(model, number_tokenizer(), stream(path, model), progress=False)
    assert all(row["experts with a class"] == 0 for row in result.specialisation)
    tokens = [token["name"] for token in result.layers[LAYER]["experts"][EXPERT]["token"]]
    assert str(TOKEN) in tokens  # that is there all the same


def test_loads_are_those_of_the_routers(found, model):
    for layer in found.layers:
        loads = [expert["load"] for expert in layer["experts"]]
        assert sum(loads) == pytest.approx(1) and layer["share"] == pytest.approx(1 / 6)  # k = 1 of 6
        assert layer["dead"] == loads.count(0)


def test_texts_without_labels(model, tmp_path):
    path = tmp_path / "texts.txt"
    path.write_text("\n".join(["5 6 7 42 8"] * 12 + ["", "9 10 42"] * 12))
    result = analyze(model, number_tokenizer(), stream(str(path), model), progress=False)
    assert result.facts["texts"] == 24 and result.facts["tokens"] == 24 * 4 and "class_times" not in result.layers[0]
    assert "experts with a class" not in result.specialisation[0]


def test_a_language_model(tmp_path):
    llama = tiny_model("llama", "AutoModelForCausalLM")
    convert(llama, k=2)
    path = write_texts(tmp_path / "texts.csv", 30)
    (tmp_path / "texts.txt").write_text("\n".join(line.split(",")[0] for line in open(path)))
    result = analyze(llama, number_tokenizer(), stream(str(tmp_path / "texts.txt"), llama), progress=False)
    assert [layer["num_experts"] for layer in result.layers] == [6, 6]


def test_sums_do_not_grow_with_the_texts(model, tmp_path):
    sizes = []
    for rows in (40, 400):
        texts = stream(write_texts(tmp_path / f"{rows}.csv", rows), model)
        found = survey_texts(texts, 99, 3)
        layers = measure(model, number_tokenizer(), texts, found, torch.arange(50), progress=False)
        state = [{name: value for name, value in vars(each).items() if name != "site"} for each in layers]
        sizes.append(len(pickle.dumps(state)))
    assert sizes[0] == pytest.approx(sizes[1], rel=0.01)


def test_the_same_texts_in_other_batches_give_the_same(found, model, tmp_path):
    path = write_texts(tmp_path / "texts.csv", 900)
    again = analyze(model, number_tokenizer(), stream(path, model, batch_size=32), progress=False)
    for one, other in zip(found.layers, again.layers, strict=True):
        assert np.array(one["class_times"]) == pytest.approx(np.array(other["class_times"]), abs=0.002)
        assert one["load_entropy"] == pytest.approx(other["load_entropy"], abs=1e-4)


def test_it_is_saved_and_loaded(found, tmp_path):
    found.save(tmp_path / "analysis.json")
    assert Analysis.load(tmp_path / "analysis.json") == found
    assert "strongest" in found.summary() and len(json.dumps(found.summary())) < 5000


def test_an_extreme_expert_is_flagged(model, found, tmp_path):
    assert not any(expert["super"] for layer in found.layers for expert in layer["experts"])
    loud = planted_model()
    loud.moe_sites()[1].down.weight.data[:, 8:16] *= 100
    path = write_texts(tmp_path / "texts.csv", 40)
    result = analyze(loud, number_tokenizer(), stream(path, loud), progress=False)
    assert [(i, e["expert"]) for i, x in enumerate(result.layers) for e in x["experts"] if e["super"]] == [(1, 1)]


def test_a_limit_ends_reading(model, tmp_path):
    texts = stream(write_texts(tmp_path / "texts.csv", 900), model, batch_size=2, limit=100)
    assert survey_texts(texts, 99, 3).texts == 64  # one window


def test_bad_input(model, tmp_path):
    path = write_texts(tmp_path / "texts.csv", 5)
    tokenizer = number_tokenizer()
    with pytest.raises(ValueError, match="BertForSequenceClassification is not MoEfied"):
        dense = tiny_model("bert", "AutoModelForSequenceClassification")
        analyze(dense, tokenizer, stream(path, model))
    with pytest.raises(ValueError, match="every layer computes all its experts"):
        analyze(planted_model(k=6), tokenizer, stream(path, model))
    with pytest.raises(ValueError, match="between 0 and 1, got 5"):
        analyze(model, tokenizer, stream(path, model), rate=5)
    with pytest.raises(ValueError, match="encoder-decoder"):
        t5 = tiny_model("t5", "AutoModelForSeq2SeqLM")
        convert(t5, k=1)
        analyze(t5, tokenizer, stream(path, model))
    with pytest.raises(ValueError, match="is no file"):
        stream(str(tmp_path / "nothing.csv"), model)
    (tmp_path / "columns.csv").write_text("topic,other\na,b\n")
    with pytest.raises(ValueError, match="has no column text; it has topic, other"):
        stream(str(tmp_path / "columns.csv"), model)
    (tmp_path / "label.csv").write_text("text,label\n5,LABEL_7\n")
    with pytest.raises(ValueError, match="row 1 has label 'LABEL_7', which is none of LABEL_0"):
        analyze(model, tokenizer, stream(str(tmp_path / "label.csv"), model))
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(ValueError, match="holds no text"):
        analyze(model, tokenizer, stream(str(tmp_path / "empty.txt"), model))


@torch.no_grad()
def test_one_router_for_all_layers_is_asked_what_the_first_reads(tmp_path):
    """So what layers would run is the same, and is what they do run."""
    model = tiny_model("bert", "AutoModelForSequenceClassification", num_labels=3)
    install_routers_(model, MoEficationConfig(expert_size=8, router="pre_gated").section())
    model.set_selection(type="top_k", k=2, allocation="uniform")
    path = write_texts(tmp_path / "texts.csv", 60)
    with open(path, encoding="utf-8") as file:
        tokens = sum(len(line.split(",")[0].split()) for line in file) - 1  # but for the header
    loads = measure_load(model, stream(path, model))
    assert loads[0] == loads[1] and sum(loads[0]) == 2 * tokens
    found = measure(
        model, number_tokenizer(), stream(path, model), survey_texts(stream(path, model), 99, 3), torch.tensor([TOKEN])
    )
    assert [layer.views["routed"].load.tolist() for layer in found] == loads
