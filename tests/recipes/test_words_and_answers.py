"""Tags of words and answers in texts: how data are read and tokenised, and a run of each task on a tiny BERT."""

import json
import random
from functools import partial
from pathlib import Path

import datasets
import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoModelForQuestionAnswering, AutoModelForTokenClassification, AutoTokenizer

from moefy_hf import Sweep
from moefy_hf.recipes.arguments import QuestionDataArguments, TokenDataArguments
from moefy_hf.recipes.tasks import main as run_task
from moefy_hf.recipes.tasks import question_answering as questions
from moefy_hf.recipes.tasks import token_classification as tokens

MOODS = {"superb": "B-GOOD", "fine": "B-GOOD", "awful": "B-BAD", "dull": "B-BAD"}
SIZES = {"train": 192, "validation": 12, "test": 12}


def sentence(choose: random.Random, words: int) -> list[str]:
    text = [f"word{choose.randrange(20)}" for _ in range(words)]
    text[choose.randrange(words)] = choose.choice([*MOODS])
    return text


@pytest.fixture(scope="module")
def tagged(tmp_path_factory) -> Path:
    """A folder of files in the form of CoNLL, in which the moods are entities."""
    folder, choose = tmp_path_factory.mktemp("tagged"), random.Random(0)
    for split, count in SIZES.items():
        lines = ["-DOCSTART- -X- O", "", "# split = " + split]
        for _ in range(count):
            lines += [f"{word} NN {MOODS.get(word, 'O')}" for word in sentence(choose, choose.randint(2, 6))] + [""]
        (folder / f"{split}.conll").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def asked(tmp_path_factory) -> Path:
    """A folder of SQuAD's json files, in which the answer is the one word of mood."""
    folder, choose = tmp_path_factory.mktemp("asked"), random.Random(0)
    for name, count in (("train-v1.1", 192), ("dev-v1.1", 12), ("test-v1.1", 12)):
        paragraphs = []
        for number in range(count):
            words = sentence(choose, 12)
            context = " ".join(words)
            (word,) = set(words) & {*MOODS}
            answers = [{"text": word, "answer_start": context.index(word)}]
            question = {"id": str(number), "question": "word0", "answers": answers}
            paragraphs.append({"context": context, "qas": [question]})
        (folder / f"{name}.json").write_text(json.dumps({"version": "1.1", "data": [{"paragraphs": paragraphs}]}))
    return folder


@pytest.fixture
def tokenizer(inputs, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return AutoTokenizer.from_pretrained(inputs["model"])


# ---- tags of words


def write(folder: Path, ending: str, rows: list[dict]) -> str:
    folder.mkdir()
    for split in SIZES:
        data = datasets.Dataset.from_list(rows)
        {"jsonl": data.to_json, "csv": data.to_csv, "parquet": data.to_parquet}[ending](folder / f"{split}.{ending}")
    return str(folder)


@pytest.mark.parametrize("ending", ["jsonl", "csv", "parquet"])
def test_a_words_first_token_carries_its_tag(tokenizer, tmp_path, ending):
    words, tags = ["word1-word2", "superb", "word3"], ["X", "Y", "X"]  # the first word has three tokens
    joined = (lambda parts: " ".join(parts)) if ending == "csv" else list
    name = write(tmp_path / "data", ending, [{"tokens": joined(words), "tags": joined(tags)}])
    splits, names = tokens.load_tokens(TokenDataArguments(name), tokenizer)
    assert names == ["X", "Y"]
    row = splits["test"][0]
    assert tokenizer.convert_ids_to_tokens(row["input_ids"])[1] == "word1" and len(row["input_ids"]) == 7
    assert row["labels"] == [-100, 0, -100, -100, 1, 0, -100]
    short, _ = tokens.load_tokens(TokenDataArguments(name, max_seq_length=5), tokenizer)
    assert short["test"][0]["labels"] == [-100, 0, -100, -100, -100]


def test_tags_that_are_classes_keep_their_numbers(tokenizer, tmp_path):
    tag = datasets.Sequence(datasets.ClassLabel(names=["O", "B-LOC"]))
    features = datasets.Features({"tokens": datasets.Sequence(datasets.Value("string")), "ner_tags": tag})
    (tmp_path / "data").mkdir()
    for split in SIZES:
        rows = datasets.Dataset.from_dict({"tokens": [["word1", "word2"]], "ner_tags": [[1, 0]]}, features)
        rows.to_parquet(tmp_path / "data" / f"{split}.parquet")
    data = TokenDataArguments(str(tmp_path / "data"), tags_column="ner_tags")
    splits, names = tokens.load_tokens(data, tokenizer)
    assert names == ["O", "B-LOC"] and splits["train"][0]["labels"] == [-100, 1, 0, -100]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("word1 X\nword2\n", "validation.conll, line 2: a word and its tag are needed, got 'word2'"),
        ("word1 Z\n", "has the tag 'Z', which no training row has: B-BAD, B-GOOD, O"),
    ],
)
def test_bad_tags_are_named(tokenizer, tagged, tmp_path, lines, message):
    for path in tagged.iterdir():
        (tmp_path / path.name).write_text(path.read_text())
    (tmp_path / "validation.conll").write_text(lines)
    with pytest.raises(ValueError, match=message):
        tokens.load_tokens(TokenDataArguments(str(tmp_path)), tokenizer)


def test_as_many_tags_as_words(tokenizer, tmp_path):
    name = write(tmp_path / "data", "jsonl", [{"tokens": ["word1", "word2"], "tags": ["X"]}])
    with pytest.raises(ValueError, match="2 words have 1 tags: 'word1 word2'"):
        tokens.load_tokens(TokenDataArguments(name), tokenizer)
    with pytest.raises(ValueError, match="no column 'ner'; it has tokens, tags"):
        tokens.load_tokens(TokenDataArguments(name, tags_column="ner"), tokenizer)


FEW = {"max_steps": 40, "calibration_tokens": 500}


def test_a_run_that_tags_words(recipe, tagged, tmp_path, capsys):
    run = tmp_path / "run"
    recipe(run, main=partial(run_task, "token_classification"), dataset_name=str(tagged), **FEW)
    sweep = Sweep.load(run / "sweep.json")
    lines = [line for split in ("validation", "test") for line in (tagged / f"{split}.conll").read_text().splitlines()]
    pairs = [line.split()[::2] for line in lines if line.startswith(("word", *MOODS))]
    assert sweep.facts["positions"] == len(pairs) and sweep.rows[0]["accuracy"] > 0.9
    dense, moefied = (json.loads((run / f"scores_{name}.json").read_text()) for name in ("dense", "moefied"))
    assert dense["dense"].keys() == {"accuracy", "precision", "recall", "f1"} and dense["dense"]["f1"] > 0.8
    assert dense["dense"]["accuracy"] == pytest.approx(sweep.rows[0]["accuracy"])
    assert set(moefied) == {"moefied at 0.25", "moefied at 0.5"}
    model = AutoModelForTokenClassification.from_pretrained(run / "moefied", trust_remote_code=True).eval()
    model.set_selection(k=0.25)
    assert model.config.id2label == {0: "B-BAD", 1: "B-GOOD", 2: "O"}
    tokenizer, right = AutoTokenizer.from_pretrained(run / "moefied"), 0
    for text in "\n".join(lines).split("\n\n"):
        rows = [line.split() for line in text.splitlines() if line.startswith(("word", *MOODS))]
        if rows:
            batch = tokenizer(" ".join(row[0] for row in rows), return_tensors="pt")
            best = model(**batch).logits[0, 1:-1].argmax(-1).tolist()  # every word is one token
            right += sum(model.config.id2label[found] == row[-1] for found, row in zip(best, rows, strict=True))
    assert moefied["moefied at 0.25"]["accuracy"] == pytest.approx(right / len(pairs))
    assert ModelCard.load(run / "moefied" / "README.md").data.pipeline_tag == "token-classification"
    assert f"| dense | all | {100 * dense['dense']['accuracy']:.1f} % |" in capsys.readouterr().out
    again = {"dataset_name": str(tagged), "recover": str(run / "moefied"), "metrics": ["none"], "max_steps": 1}
    recipe(tmp_path / "again", main=partial(run_task, "token_classification"), **again)
    model = AutoModelForTokenClassification.from_pretrained(tmp_path / "again" / "recovered", trust_remote_code=True)
    assert len(model.moe_sites()) == 2


# ---- answers


def test_windows_overlap_and_know_where_the_answer_is(tokenizer):
    context = " ".join(f"word{number}" for number in range(12))
    answers = {"text": ["word8 word9"], "answer_start": [context.index("word8")]}
    row = {"context": context, "question": "word0", "answers": answers}
    data = QuestionDataArguments("x", max_seq_length=10, doc_stride=2)  # 6 words of the text in a window
    found = questions.windows(datasets.Dataset.from_list([row]), data, tokenizer, "test")
    texts = [tokenizer.convert_ids_to_tokens(ids)[3:-1] for ids in found["input_ids"]]
    assert [(text[0], text[-1]) for text in texts] == [("word0", "word5"), ("word4", "word9"), ("word8", "word11")]
    assert list(zip(found["start_positions"], found["end_positions"], strict=True)) == [(0, 0), (7, 8), (3, 4)]
    for number, (start, end) in ((1, (7, 8)), (2, (3, 4))):
        offsets = found["offsets"][number]
        assert context[offsets[start][0] : offsets[end][1]] == "word8 word9" and offsets[0] == offsets[1] == [-1, -1]
    assert found["row"][:] == [0, 0, 0]
    nothing = row | {"answers": {"text": [], "answer_start": []}}
    both = datasets.Dataset.from_list([row, nothing])
    assert questions.windows(both, data, tokenizer, "test")["start_positions"][3:] == [0, 0, 0]


def test_the_likeliest_span_ends_after_it_starts_and_is_short():
    start = torch.tensor([9.0, 0, 5, 0, 1, 9])  # the last position is padding, the first no text
    end = torch.tensor([9.0, 4, 1, 0, 3, 9])
    inside = torch.tensor([False, True, True, True, True])
    assert questions.best_span(start, end, inside, 30) == (8, (2, 4))
    assert questions.best_span(start, end, inside, 2) == (6, (2, 2))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"question_column": "query"}, "no column 'query'; it has context, question, answers"),
        ({"validation_split": "dev"}, "no split 'dev'; it has validation, test, train"),
        ({"doc_stride": 384}, "less than max_seq_length 384, got 384"),
    ],
)
def test_bad_questions_are_named(asked, settings, message):
    with pytest.raises(ValueError, match=message):
        questions.load_questions(QuestionDataArguments(str(asked), **settings))


def test_a_misplaced_answer_is_named(tokenizer, tmp_path):
    answers = {"text": ["word2"], "answer_start": [0]}
    name = write(tmp_path / "data", "parquet", [{"context": "word1 word2", "question": "word0", "answers": answers}])
    with pytest.raises(ValueError, match="split 'train' of .*: the answer 'word2' is not at character 0"):
        questions.load_questions(QuestionDataArguments(name))


def test_a_run_that_answers(recipe, asked, tmp_path, capsys):
    run, one = tmp_path / "run", partial(run_task, "question_answering")
    recipe(run, main=one, dataset_name=str(asked), max_seq_length=12, doc_stride=4, **FEW | {"max_steps": 60})
    dense, moefied = (json.loads((run / f"scores_{name}.json").read_text()) for name in ("dense", "moefied"))
    assert dense["dense"].keys() == {"exact_match", "f1"} and dense["dense"]["exact_match"] > 0.5
    model = AutoModelForQuestionAnswering.from_pretrained(run / "moefied", trust_remote_code=True).eval()
    assert type(model).__name__ == "MoefiedBertForQuestionAnswering"
    model.set_selection(k=0.25)
    tokenizer, right = AutoTokenizer.from_pretrained(run / "moefied"), []
    for name in ("dev", "test"):
        for paragraph in json.loads((asked / f"{name}-v1.1.json").read_text())["data"][0]["paragraphs"]:
            best = (-torch.inf, "")
            words = paragraph["context"].split()
            for first in (0, 4):  # windows of 8 words, which share 4
                part = words[first : first + 8]
                batch = tokenizer("word0", " ".join(part), return_tensors="pt")
                with torch.no_grad():
                    output = model(**batch)
                for start in range(len(part)):
                    for end in range(start, len(part)):
                        score = float(output.start_logits[0, 3 + start] + output.end_logits[0, 3 + end])
                        best = max(best, (score, " ".join(part[start : end + 1])))
            right.append(best[1] == paragraph["qas"][0]["answers"][0]["text"])
    assert moefied["moefied at 0.25"]["exact_match"] == pytest.approx(sum(right) / 24)
    assert ModelCard.load(run / "moefied" / "README.md").data.pipeline_tag == "question-answering"
    assert Sweep.load(run / "sweep.json").facts["quality"] == "accuracy"
    assert "| model | experts per token | exact_match | f1 |" in capsys.readouterr().out
    again = {"dataset_name": str(asked), "recover": str(run / "moefied"), "metrics": ["none"], "max_steps": 1}
    recipe(tmp_path / "again", main=one, max_seq_length=12, doc_stride=4, **again)
    model = AutoModelForQuestionAnswering.from_pretrained(tmp_path / "again" / "recovered", trust_remote_code=True)
    assert len(model.moe_sites()) == 2
