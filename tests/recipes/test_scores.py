"""Task metrics by `evaluate`: those that come with the package, and local ones, without a network."""

import json
from collections import Counter
from pathlib import Path

import pytest
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from moefy_hf.recipes.scores import BUNDLED, Metrics
from moefy_hf.recipes.summary import table

MODULE = """
import datasets
import evaluate


class {name}(evaluate.Metric):
    def _info(self):
        numbers = datasets.Features(dict.fromkeys(("predictions", "references"), datasets.Value("int32")))
        return evaluate.MetricInfo(description="", citation="", inputs_description="", features=numbers)

    def _compute(self, predictions, references, of=1):
        of = int(of)
        if of not in references:
            raise ValueError(f"no reference is of class {{of}}")
        hits = [p == of for p, r in zip(predictions, references) if r == of]
        return {{"recall_of_class": sum(hits) / len(hits), "each": hits}}
"""


@pytest.fixture
def module(tmp_path) -> str:
    """A metric of one's own, as `evaluate` has them: a folder with a script of the same name."""
    folder = tmp_path / "recall_of_class"
    folder.mkdir()
    (folder / "recall_of_class.py").write_text(MODULE.format(name="RecallOfClass"))
    return str(folder)


def test_what_comes_with_the_package_needs_no_network():
    assert set(BUNDLED) == {"accuracy", "exact_match", "seqeval", "squad"}
    assert Metrics(["accuracy"], range(3))([0, 1, 1, 2], [0, 1, 0, 0]) == {"accuracy": 0.5}
    assert Metrics(["exact_match"], ["a"])(["a b", "c"], ["a b", "d"]) == {"exact_match": 0.5}


def test_entities_are_counted_whole():
    right = [["B-PER", "I-PER", "O", "B-LOC"], ["O", "B-LOC"]]
    found = [["B-PER", "O", "O", "B-LOC"], ["B-LOC", "B-LOC"]]  # one of two persons' words, and a place too many
    judge = Metrics(["seqeval"], [["B-PER", "I-PER", "B-LOC", "O"]])
    assert judge(found, right) == pytest.approx({"accuracy": 4 / 6, "precision": 2 / 4, "recall": 2 / 3, "f1": 4 / 7})
    assert judge([["NN", "VB"]], [["NN", "NN"]]) == {"accuracy": 0.5}  # parts of speech are no entities


def test_answers_are_compared_as_squad_does():
    def asked(*texts):
        return {"text": [*texts], "answer_start": [0] * len(texts)}

    cases = [  # (answer, right ones, exact, F1)
        ("The Eiffel Tower!", ("eiffel tower", "tower"), 1, 1),
        ("in the old town", ("old town hall",), 0, 2 * 2 / (3 + 3)),
        ("", (), 1, 1),
        ("something", (), 0, 0),
        ("", ("something",), 0, 0),
    ]
    judge = Metrics(["squad"], [{"id": "0", "prediction_text": "a"}], [{"id": "0", "answers": asked("a")}])
    for text, right, exact, overlap in cases:
        scores = judge([{"id": "7", "prediction_text": text}], [{"id": "7", "answers": asked(*right)}])
        assert scores == pytest.approx({"exact_match": exact, "f1": overlap}), text


def test_a_local_module_and_its_settings(module):
    found, right = [0, 1, 1, 0], [0, 1, 0, 1]
    judge = Metrics(["accuracy", module], range(2))
    assert judge(found, right) == {"accuracy": 0.5, "recall_of_class": 0.5}  # single numbers only
    assert Metrics([f"{module}:of=0"], range(2))([0, 1, 0], [0, 0, 0]) == {"recall_of_class": pytest.approx(2 / 3)}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("f1", "--metrics f1 cannot be loaded.*accuracy, exact_match, seqeval, squad, which need no network"),
        ("{module}:of=7", "no reference is of class 7; settings are given like"),
        ("{module}:most=7", "most"),
        ("accuracy:of", "settings are given like f1:average=macro"),
    ],
)
def test_what_cannot_be_used_is_found_before_any_work(name, message, module):
    with pytest.raises(ValueError, match=message):
        Metrics([name.format(module=module)], range(2))
    with pytest.raises(ValueError, match="--metrics accuracy: "):
        Metrics(["accuracy"], ["a text"])  # is of classes


def test_a_run_scores_all_its_models(recipe, refused, inputs, module, tmp_path, capsys):
    run = tmp_path / "run"
    small = {"max_steps": 12, "eval_strategy": "steps", "eval_steps": 12}
    recipe(run, "--metrics", "accuracy", f"{module}:of=0", **small)
    out = capsys.readouterr().out
    assert "'eval_recall_of_class'" in out and "'eval_accuracy'" in out  # the Trainer's, too
    dense, moefied = (json.loads((run / f"scores_{name}.json").read_text()) for name in ("dense", "moefied"))
    assert set(dense) == {"dense"} and set(moefied) == {"moefied at 0.25", "moefied at 0.5"}
    model = AutoModelForSequenceClassification.from_pretrained(run / "moefied", trust_remote_code=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(run / "moefied")
    model.set_selection(k=0.25)
    right: Counter = Counter()
    for split in ("validation", "test"):
        for line in (Path(inputs["texts"]) / f"{split}.csv").read_text().splitlines()[1:]:
            text, label = line.split(",")
            batch = tokenizer(text, truncation=True, max_length=10, return_tensors="pt")
            right[label, ("bad", "good")[int(model(**batch).logits.argmax())]] += 1
    expected = (right["bad", "bad"] + right["good", "good"]) / 48
    scores = moefied["moefied at 0.25"]
    assert scores["accuracy"] == pytest.approx(expected)
    assert scores["recall_of_class"] == pytest.approx(
        right["bad", "bad"] / sum(right[key] for key in right if key[0] == "bad")
    )
    row = f"| MoEfied | 25 % | {100 * scores['accuracy']:.1f} % | {100 * scores['recall_of_class']:.1f} % |"
    assert row in out and f"| dense | all | {100 * dense['dense']['accuracy']:.1f} % |" in out
    with refused(r"\(metrics changed\)"):
        recipe(run, **small)
    with refused("--metrics f1 cannot be loaded"):
        recipe(tmp_path / "other", "--metrics", "f1")
    assert not (tmp_path / "other").exists()


def test_a_batch_is_timed(recipe, tmp_path, capsys):
    recipe(tmp_path / "run", "--metrics", "none", "--timed_batches", "2", max_steps=1, budgets=[0.5])
    times = json.loads((tmp_path / "run" / "times.json").read_text())
    assert times["batches"] == 1 and times["rows"] == 48  # all there is
    assert {name: set(each) for name, each in times["milliseconds"].items()} == {
        "dense": {"dense"},
        "moefied at 0.5": {"auto", "masked"},
    }
    assert all(value > 0 for each in times["milliseconds"].values() for value in each.values())
    out = capsys.readouterr().out
    assert "| model | experts per token | ms per batch | speed | ms masked |" in out
    assert not list((tmp_path / "run").glob("scores_*"))


def test_a_table_says_how_fast_each_model_is():
    scores = {
        "dense": {"accuracy": 0.9},
        "moefied at 0.2": {"accuracy": 0.875},
        "recovered as learned": {"accuracy": 1},
    }
    times = {"dense": {"dense": 120.0}, "moefied at 0.2": {"auto": 80.0, "masked": 130.0}}
    assert table(scores, times, percent=True).splitlines()[2:] == [
        "| dense | all | 90.0 % | 120 |  |  |",
        "| MoEfied | 20 % | 87.5 % | 80 | 1.50 x dense | 130 |",
        "| MoEfied, then fine-tuned | as learned | 100.0 % |  |  |  |",
    ]
    assert table({"dense": {"whales": 49.513}}, {}, percent=False).splitlines()[2] == "| dense | all | 49.51 |"
