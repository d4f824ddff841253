"""Facts gathered beside a checkpoint, and the card that is rendered from them."""

import json

import pytest
import torch
from huggingface_hub import ModelCard
from tiny import convert, tiny_inputs, tiny_model

from moefy_hf import evaluate
from moefy_hf.hub.card import PLOT, TASKS, model_card, write_card
from moefy_hf.hub.card_text import budget, example
from moefy_hf.hub.facts import FILE, add_facts, read_facts
from moefy_hf.io import is_hub_id
from moefy_hf.modeling.selection_config import check_selection

HEAD = "AutoModelForSequenceClassification"


@pytest.fixture(scope="module")
def measured():
    model = tiny_model("bert", HEAD)
    report = convert(model, k=0.5)
    batch = {**tiny_inputs("bert", HEAD), "labels": torch.tensor([0, 1])}
    return model, report, evaluate(model, [batch], (0.2, 0.5), progress=False)


@pytest.fixture
def folder(measured, tmp_path):
    model, report, sweep = measured
    folder = tmp_path / "bert-moe"
    model.save_pretrained(folder)
    add_facts(folder, conversion=report, sweep=sweep, base_model="google-bert/bert-tiny", license="mit")
    add_facts(folder, evaluation={"data": "stanfordnlp/imdb", "split": "test"})
    return folder


def test_parts_add_up(folder):
    assert add_facts(folder, evaluation="imdb")["evaluation"] == {"data": "imdb"}
    found = add_facts(folder, license=None, training={"epochs": 1})
    assert found == read_facts(folder) and found["license"] == "mit" and found["training"] == {"epochs": 1}
    assert found["versions"]["torch"] == torch.__version__
    assert not list(folder.glob("*.tmp"))
    with pytest.raises(ValueError, match="unknown part 'licence' of .*; choose from base_model, license"):
        add_facts(folder, licence="mit")
    for bad in ({"speed": []}, {"license": ["mit"]}, {"sweep": {"rows": []}}):
        with pytest.raises(ValueError, match=f"{next(iter(bad))} must be"):
            add_facts(folder, **bad)
    assert read_facts(folder) == found


def test_metadata_is_what_the_hub_parses(folder, measured):
    write_card(folder, "me/bert-moe")
    data = ModelCard.load(folder / "README.md").data
    assert (data.base_model, data.base_model_relation, data.license) == ("google-bert/bert-tiny", "finetune", "mit")
    assert (data.library_name, data.pipeline_tag) == ("transformers", "text-classification")
    assert {"custom_code", "moefication", "moe"} <= set(data.tags)
    own = [row for row in measured[2].rows if row["router"] == "own"]
    assert [result.metric_value for result in data.eval_results] == [row["accuracy"] for row in own]
    assert {(r.dataset_type, r.dataset_split, r.metric_type) for r in data.eval_results} == {
        ("stanfordnlp/imdb", "test", "accuracy")
    }


def test_the_card_says_what_is_known(folder, measured):
    _, report, sweep = measured
    text = write_card(folder, "me/bert-moe").read_text()
    for part in (sweep.table(), report.table(), PLOT, "`random`", "50% of the experts", "Licence: mit"):
        assert part in text
    assert f'{HEAD}.from_pretrained("me/bert-moe", trust_remote_code=True)' in text
    assert "Measured on stanfordnlp/imdb, test." in text and "pin the commit" in text
    assert (folder / PLOT).stat().st_size > 10_000
    assert 'trust_remote_code=True, revision="v1")' in str(model_card(folder, "me/bert-moe", "v1"))


def test_what_is_not_known_is_left_out(measured, tmp_path):
    measured[0].save_pretrained(tmp_path / "bare")
    text = write_card(tmp_path / "bare").read_text()
    assert text.count("# bare") == 1 and "BertForSequenceClassification" in text
    for word in (
        "More Information",
        "None",
        "Licence",
        "Quality against",
        "Speed",
        "base model |",
        "Every layer",
        "{",
    ):
        assert word not in text.partition("```bibtex")[0], word
    assert not (tmp_path / "bare" / PLOT).exists()
    data = ModelCard.load(tmp_path / "bare" / "README.md").data
    assert data.base_model is None and data.eval_results is None and data.license is None


def test_measured_speed_is_shown(folder):
    add_facts(folder, speed={"hardware": "2 cores", "rows": [{"tokens": 1, "of dense": 0.5}]})
    assert "Measured on 2 cores.\n\n| tokens | of dense |\n|---|---|\n| 1 | 0.5 |" in str(model_card(folder))


def test_a_card_is_not_overwritten_unasked(folder):
    path = write_card(str(folder))
    add_facts(folder, license="apache-2.0")
    assert "Licence: apache-2.0" in write_card(folder).read_text()  # as it was rendered: nobody has written in it
    path.write_text(path.read_text() + "mine")
    with pytest.raises(FileExistsError, match="README.md exists"):
        write_card(folder)
    assert path.read_text().endswith("mine")
    write_card(folder, overwrite=True)
    assert not path.read_text().endswith("mine")


def test_the_base_model_that_the_conversion_saw(measured, tmp_path):
    model, report, _ = measured
    model.save_pretrained(tmp_path)
    add_facts(tmp_path, conversion={**report.to_dict(), "base_model": "google-bert/bert-tiny"})
    assert model_card(tmp_path).data.base_model == "google-bert/bert-tiny"


def test_what_is_no_moefied_checkpoint(tmp_path):
    with pytest.raises(ValueError, match="no config.json"):
        model_card(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(ValueError, match="is not MoEfied"):
        write_card(tmp_path)
    assert not (tmp_path / "README.md").exists() and not (tmp_path / FILE).exists()


@pytest.mark.parametrize(
    ("name", "is_one"),
    [
        ("google-bert/bert-base-uncased", True),
        ("bert", False),
        ("a/b/c", False),
        ("./a/b", False),
        ("My model", False),
    ],
)
def test_hub_ids(name, is_one):
    assert is_hub_id(name) is is_one


def test_folders_are_no_hub_ids(tmp_path, monkeypatch):
    (tmp_path / "outputs" / "dense").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert not is_hub_id("outputs/dense") and is_hub_id("outputs/other")


def test_tasks_are_named_after_heads_of_transformers():
    import transformers

    assert all(hasattr(transformers, name) for name in TASKS)


@pytest.mark.parametrize(
    ("selection", "said"),
    [
        ({"type": "top_k", "k": 0.2}, "20% of the experts, the same in each layer"),
        ({"type": "top_k", "k": [3, 4]}, "3, 4 experts, layer by layer"),
        (
            {"type": "top_p", "k": 4, "allocation": "sensitivity"},
            "4 experts on average, by `top_p`, more where a layer needs them",
        ),
        (
            {"type": "top_k", "k": 0.2, "allocation": "angular"},
            "20% of the experts, more where a layer turns the hidden states further",
        ),
        (
            {"type": "threshold", "k": 0.2, "allocation": "global"},
            "20% of the experts on average, by `threshold`, by one setting for all layers",
        ),
        ({"type": "threshold", "tau": 0.9}, "as many experts as a token needs: `threshold`, tau 0.9"),
        ({"type": "level", "level": [1.5, 2.0]}, "as many experts as a token needs: `level`, level [1.5, 2.0]"),
    ],
)
def test_the_budget_of_every_selection(selection, said):
    check_selection(selection)
    assert budget(selection) == said


@pytest.mark.parametrize(
    ("selection", "said"),
    [
        ({"type": "level", "k": 0.2}, "set_selection(k=0.5)  # the budget, any time: a share"),
        ({"type": "threshold", "tau": 0.9}, "set_selection(tau=0.9)  # the budget, any time: the larger"),
        ({"type": "level", "level": [1.5, 2.0]}, "set_selection(level=1.5)  # the budget"),
    ],
)
def test_the_example_sets_what_can_be_set(selection, said):
    assert said in "set_selection(" + example(selection)
