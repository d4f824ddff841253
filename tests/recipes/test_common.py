"""What the recipes share: settings from files and the command line, labelled text, batches."""

import sys
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, TrainingArguments

sys.path.insert(0, str(Path(__file__).parents[2] / "recipes"))
import common  # noqa: E402

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

    def write(header: str = "text,label", labels=("good", "bad"), **settings) -> common.DataArguments:
        folder = tmp_path / "texts"
        folder.mkdir(exist_ok=True)
        for split, rows in (("train", 6), ("validation", 4), ("test", 2)):
            lines = [f"{'a ' * (row + 1)}b,{labels[row % len(labels)]}" for row in range(rows)]
            (folder / f"{split}.csv").write_text("\n".join([header, *lines]) + "\n")
        return common.DataArguments(str(folder), **settings)

    return write


# ---- settings


@dataclass
class Numbers:
    count: int = 1
    rate: float = 0.5
    shares: list[float] = field(default_factory=lambda: [0.1])
    flag: bool = False
    name: str | None = None


@pytest.fixture
def parse(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)  # a CPU adds a setting of TrainingArguments

    def run(yaml: str | None, *arguments: str, types=(Numbers,)):
        if yaml is None:
            return common.parse(types, "about", list(arguments))
        (tmp_path / "config.yaml").write_text(yaml)
        return common.parse(types, "about", ["--config", str(tmp_path / "config.yaml"), *arguments])

    return run


def test_settings_from_a_file_and_the_command_line(parse):
    file = "count: 3\nrate: 1.0e-4\nshares: [0.2, 0.3]\nflag: true\nname: null\n"
    assert parse(file) == [Numbers(3, 1e-4, [0.2, 0.3], True, None)]
    assert parse(file, "--count", "4", "--shares", "0.5", "--flag", "false") == [Numbers(4, 1e-4, [0.5], False)]
    assert parse(None) == [Numbers()]
    assert parse(None, "--flag") == [Numbers(flag=True)]
    assert parse("count: -3\nname: 'two words'\n") == [Numbers(count=-3, name="two words")]


def test_a_later_file_wins(parse, tmp_path):
    (tmp_path / "second.yaml").write_text("count: 9\n")
    assert parse("count: 3\nrate: 2\n", "--config", str(tmp_path / "second.yaml")) == [Numbers(9, 2.0)]


@pytest.mark.parametrize("name", ["number", "counts", "cou"])  # no abbreviations either
def test_unknown_names_are_errors(parse, name, capsys):
    for attempt in (lambda: parse(f"{name}: 3\n"), lambda: parse(None, f"--{name}", "3")):
        with pytest.raises((ValueError, SystemExit)) as error:
            attempt()
        assert name in str(error.value) + capsys.readouterr().err


def test_config_needs_a_file(parse):
    with pytest.raises(SystemExit, match="YAML"):
        parse(None, "--config")
    with pytest.raises(FileNotFoundError):
        parse(None, "--config", "nowhere.yaml")


def test_a_cpu_is_asked_for_where_there_is_nothing_else(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    (args,) = common.parse((TrainingArguments,), "about", ["--output_dir", str(tmp_path), "--bf16", "true"])
    assert args.use_cpu and args.bf16


def test_defaults_are_valid_settings():
    arguments = common.MoeficationArguments()
    assert arguments.allocation in ("sensitivity", "uniform") and all(0 < share <= 1 for share in arguments.shares)


# ---- labelled text


def test_texts(texts):
    splits, names = common.load_texts(texts(), word_tokenizer())
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
    splits, _ = common.load_texts(texts(max_seq_length=5), word_tokenizer())
    assert splits["train"]["length"][:] == [4, 5, 5, 5, 5, 5]
    assert all(ids[-1] == 3 for ids in splits["train"]["input_ids"])


def test_columns_and_splits_may_have_other_names(texts):
    data = texts("sentence,mood", text_column="sentence", label_column="mood", test_split="validation")
    splits, names = common.load_texts(data, word_tokenizer())
    assert names == ["bad", "good"] and len(splits["test"]) == 4


def test_labels_may_be_numbers(texts):
    splits, names = common.load_texts(texts(labels=(3, 1, 2)), word_tokenizer())
    assert names == ["1", "2", "3"] and splits["train"]["labels"][:] == [2, 0, 1, 2, 0, 1]


def test_class_labels_keep_their_names_and_numbers(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "texts").mkdir()
    feature = datasets.ClassLabel(names=["zebra", "ape"])
    features = datasets.Features({"text": datasets.Value("string"), "label": feature})
    for split in ("train", "validation", "test"):
        rows = {"text": ["a", "b"], "label": [0, 1]}
        datasets.Dataset.from_dict(rows, features).to_parquet(tmp_path / "texts" / f"{split}.parquet")
    splits, names = common.load_texts(common.DataArguments(str(tmp_path / "texts")), word_tokenizer())
    assert names == ["zebra", "ape"] and splits["train"]["labels"][:] == [0, 1]


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
        common.load_texts(texts(**settings), word_tokenizer())


def test_a_label_that_training_never_saw_is_named(texts):
    data = texts()
    (Path(data.dataset_name) / "test.csv").write_text("text,label\na b,ugly\n")
    with pytest.raises(ValueError, match="ugly.*bad, good"):
        common.load_texts(data, word_tokenizer())


def test_rows_without_a_class_are_named(tmp_path, monkeypatch):
    """GLUE's test splits have the label -1 everywhere."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "texts").mkdir()
    features = {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["bad", "good"])}
    for split, label in (("train", 0), ("validation", 1), ("test", -1)):
        rows = datasets.Dataset.from_dict({"text": ["a"], "label": [label]}, datasets.Features(features))
        rows.to_parquet(tmp_path / "texts" / f"{split}.parquet")
    with pytest.raises(ValueError, match="'test'.*-1.*bad, good"):
        common.load_texts(common.DataArguments(str(tmp_path / "texts")), word_tokenizer())


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
    batches = common.Batches(rows, word_tokenizer(), batch_size=8, shuffle=shuffle)
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
    order = [lengths[int(label)] for batch in common.Batches(rows, word_tokenizer(), 8) for label in batch["labels"]]
    assert order == sorted(lengths)


def test_shuffling_follows_the_seed(rows):
    def order(**settings) -> list[int]:
        batches = common.Batches(rows, word_tokenizer(), 8, **settings)
        return [int(label) for batch in batches for label in batch["labels"]]

    assert order(shuffle=True, seed=1) == order(shuffle=True, seed=1) != order(shuffle=True, seed=2)
    together = [
        {frozenset(batch["labels"].tolist()) for batch in common.Batches(rows, word_tokenizer(), 8, True, seed)}
        for seed in (1, 2)
    ]
    assert together[0] != together[1]  # rows are mixed, too, not only whole batches


def test_the_first_batches_of_a_shuffle_are_a_fair_sample():
    lengths = sorted(torch.randint(1, 20, (1200,), generator=torch.Generator().manual_seed(0)).tolist())
    ids = [[4] * length for length in lengths]
    rows = datasets.Dataset.from_dict({"input_ids": ids, "labels": [0] * 1200, "length": lengths})
    batches = iter(common.Batches(rows, word_tokenizer(), 4, shuffle=True))
    sizes = [next(batches)["input_ids"].shape[1] for _ in range(75)]
    assert sum(sizes) / len(sizes) == pytest.approx(10, abs=2)
