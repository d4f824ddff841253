"""Labelled text and batches of it."""

from pathlib import Path

import datasets
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from moefy_hf.recipes.arguments import TextDataArguments
from moefy_hf.recipes.data import Batches, load_texts

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "b", "c", "good", "bad"]


def word_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: position for position, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


@pytest.fixture
def texts(tmp_path, monkeypatch):
    """Write csv files, get `DataArguments` for them; the cache of `datasets` goes to tmp_path, too."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def write(header: str = "text,label", labels=("good", "bad"), **settings) -> TextDataArguments:
        folder = tmp_path / "texts"
        folder.mkdir(exist_ok=True)
        for split, rows in (("train", 6), ("validation", 4), ("test", 2)):
            lines = [f"{'a ' * (row + 1)}b,{labels[row % len(labels)]}" for row in range(rows)]
            (folder / f"{split}.csv").write_text("\n".join([header, *lines]) + "\n")
        return TextDataArguments(str(folder), **settings)

    return write


# ---- labelled text


def test_texts(texts):
    splits, names = load_texts(texts(), word_tokenizer())
    assert names == ["bad", "good"] and {split: len(rows) for split, rows in splits.items()} == {
        "train": 6,
        "validation": 4,
        "test": 2,
    }
    first = splits["train"][0]
    assert first["input_ids"] == [2, 4, 5, 3] and first["labels"] == 1 and first["length"] == 4
    assert set(splits["test"].column_names) >= {"input_ids", "attention_mask", "labels", "length"}
    assert not {"text", "label"} & set(splits["test"].column_names)


def test_long_texts_are_cut(texts):
    splits, _ = load_texts(texts(max_seq_length=5), word_tokenizer())
    assert splits["train"]["length"][:] == [4, 5, 5, 5, 5, 5]
    assert all(ids[-1] == 3 for ids in splits["train"]["input_ids"])


def test_columns_and_splits_may_have_other_names(texts):
    data = texts("sentence,mood", text_column="sentence", label_column="mood", test_split="validation")
    splits, names = load_texts(data, word_tokenizer())
    assert names == ["bad", "good"] and len(splits["test"]) == 4


def test_labels_may_be_numbers(texts):
    splits, names = load_texts(texts(labels=(3, 1, 2)), word_tokenizer())
    assert names == ["1", "2", "3"] and splits["train"]["labels"][:] == [2, 0, 1, 2, 0, 1]


def test_class_labels_keep_their_names_and_numbers(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "texts").mkdir()
    feature = datasets.ClassLabel(names=["zebra", "ape"])
    features = datasets.Features({"text": datasets.Value("string"), "label": feature})
    for split in ("train", "validation", "test"):
        rows = {"text": ["a", "b"], "label": [0, 1]}
        datasets.Dataset.from_dict(rows, features).to_parquet(tmp_path / "texts" / f"{split}.parquet")
    splits, names = load_texts(TextDataArguments(str(tmp_path / "texts")), word_tokenizer())
    assert names == ["zebra", "ape"] and splits["train"]["labels"][:] == [0, 1]


def test_fewer_rows(texts):
    splits, names = load_texts(texts(max_train_samples=4, max_eval_samples=3), word_tokenizer())
    assert [len(splits[name]) for name in ("train", "validation", "test")] == [4, 3, 2] and names == ["bad", "good"]
    again, _ = load_texts(texts(max_train_samples=4), word_tokenizer())
    assert again["train"]["input_ids"][:] == splits["train"]["input_ids"][:]
    assert len(load_texts(texts(max_train_samples=40), word_tokenizer())[0]["train"]) == 6


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"text_column": "sentence"}, "no column 'sentence'.*text, label"),
        ({"label_column": "mood"}, "no column 'mood'.*text, label"),
        ({"validation_split": "dev"}, "no split 'dev'.*train, validation, test"),
        ({"test_split": "final"}, "no split 'final'"),
    ],
)
def test_what_is_missing_is_named(texts, settings, message):
    with pytest.raises(ValueError, match=message):
        load_texts(texts(**settings), word_tokenizer())


def test_a_label_that_training_never_saw_is_named(texts):
    data = texts()
    (Path(data.dataset_name) / "test.csv").write_text("text,label\na b,ugly\n")
    with pytest.raises(ValueError, match="ugly.*bad, good"):
        load_texts(data, word_tokenizer())


def test_rows_without_a_class_are_named(tmp_path, monkeypatch):
    """GLUE's test splits have the label -1 everywhere."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "texts").mkdir()
    features = {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["bad", "good"])}
    for split, label in (("train", 0), ("validation", 1), ("test", -1)):
        rows = datasets.Dataset.from_dict({"text": ["a"], "label": [label]}, datasets.Features(features))
        rows.to_parquet(tmp_path / "texts" / f"{split}.parquet")
    with pytest.raises(ValueError, match="'test'.*-1.*bad, good"):
        load_texts(TextDataArguments(str(tmp_path / "texts")), word_tokenizer())


# ---- batches


@pytest.fixture
def rows() -> datasets.Dataset:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 9, (50,), generator=generator).tolist()
    return datasets.Dataset.from_dict(
        {
            "input_ids": [[4] * length for length in lengths],
            "attention_mask": [[1] * length for length in lengths],
            "labels": list(range(50)),
            "length": lengths,
        }
    )


@pytest.mark.parametrize("shuffle", [False, True])
def test_every_row_once_padded_and_any_number_of_times(rows, shuffle):
    batches = Batches(rows, word_tokenizer(), batch_size=8, shuffle=shuffle)
    first, second = list(batches), list(batches)
    assert len(first) == len(batches) == 7
    seen = torch.cat([batch["labels"] for batch in first])
    assert sorted(seen.tolist()) == list(range(50))
    for batch, again in zip(first, second, strict=True):
        assert set(batch) == {"input_ids", "attention_mask", "labels"}
        assert all(torch.equal(batch[key], again[key]) for key in batch)
        lengths = torch.tensor([rows[int(label)]["length"] for label in batch["labels"]])
        assert batch["input_ids"].shape == batch["attention_mask"].shape == (len(lengths), lengths.max())
        assert torch.equal(batch["attention_mask"].sum(1), lengths)
        assert torch.equal(batch["input_ids"] == 4, batch["attention_mask"] == 1)


def test_shortest_first_unless_shuffled(rows):
    lengths = rows["length"][:]
    order = [lengths[int(label)] for batch in Batches(rows, word_tokenizer(), 8) for label in batch["labels"]]
    assert order == sorted(lengths)


def test_shuffling_follows_the_seed(rows):
    def order(**settings) -> list[int]:
        batches = Batches(rows, word_tokenizer(), 8, **settings)
        return [int(label) for batch in batches for label in batch["labels"]]

    assert order(shuffle=True, seed=1) == order(shuffle=True, seed=1) != order(shuffle=True, seed=2)
    together = [
        {frozenset(batch["labels"].tolist()) for batch in Batches(rows, word_tokenizer(), 8, True, seed)}
        for seed in (1, 2)
    ]
    assert together[0] != together[1]  # rows are mixed, too, not only whole batches


def test_the_first_batches_of_a_shuffle_are_a_fair_sample():
    lengths = sorted(torch.randint(1, 20, (1200,), generator=torch.Generator().manual_seed(0)).tolist())
    ids = [[4] * length for length in lengths]
    rows = datasets.Dataset.from_dict({"input_ids": ids, "labels": [0] * 1200, "length": lengths})
    batches = iter(Batches(rows, word_tokenizer(), 4, shuffle=True))
    sizes = [next(batches)["input_ids"].shape[1] for _ in range(75)]
    assert sum(sizes) / len(sizes) == pytest.approx(10, abs=2)
