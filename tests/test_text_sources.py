"""What `--data` takes: files of each kind, folders, standard input, datasets of the Hub; columns, pairs, targets."""

import io
import json
import sys
from dataclasses import fields

import datasets
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, IterableDataset, Value
from datasets.exceptions import DatasetNotFoundError
from test_cli import number_tokenizer
from test_text_files import refused, save, words
from tiny import convert, tiny_model

from moefy_hf.cli.main import main, parser
from moefy_hf.data import Row, TextBatches, Texts, TextSource, TokenBudget
from moefy_hf.hub.facts import read_facts

CLASSIFIER, SEQ2SEQ, CAUSAL = (
    *("AutoModelForSequenceClassification", "AutoModelForSeq2SeqLM", "AutoModelForCausalLM"),
)
TEXTS, LABELS = ["007", "None", 'five "6, 7"', "tab\tand é", "NA"], ["no", "yes", "no", "yes", "yes"]
READ = Texts(TEXTS, labels=[0, 1, 0, 1, 1])


@pytest.fixture(scope="module")
def classifier():
    return tiny_model("bert", CLASSIFIER, id2label={0: "no", 1: "yes"})


@pytest.fixture(scope="module")
def t5():
    return tiny_model("t5", SEQ2SEQ)


def write(path, columns: dict[str, list]) -> str:
    """Write a table in the format that its name says; return the path."""
    table = Dataset.from_dict(columns)
    if path.suffix == ".parquet":
        table.to_parquet(str(path))
    elif path.suffix == ".json":
        path.write_text(json.dumps(table.to_list()))
    elif path.suffix == ".txt":
        path.write_text("\n".join(columns["text"]) + "\n")
    elif path.suffix in (".jsonl", ".ndjson"):
        path.write_text("\n".join(map(json.dumps, table.to_list())))
    else:
        table.to_csv(str(path), index=False, sep="\t" if path.suffix == ".tsv" else ",")
    return str(path)


def read(path, model, labels: bool = True, **settings) -> Texts:
    return TextSource(str(path), **settings).open().read(model, labels=labels)


@pytest.mark.parametrize("kind", ["csv", "tsv", "json", "jsonl", "ndjson", "parquet"])
def test_tables_of_each_kind_are_read_alike(kind, classifier, tmp_path):
    path = write(tmp_path / f"table [1].{kind}", {"id": [*range(5)], "text": TEXTS, "label": LABELS})
    assert read(path, classifier) == READ
    assert read(path, classifier, max_rows=2) == READ.select([0, 1])
    assert read(path, classifier, labels=False) == Texts(TEXTS)
    assert read(path, tiny_model("llama", CAUSAL)) == Texts(TEXTS)  # it has no classes
    rows = TextSource(path).open().rows(classifier, labels=True)
    assert [*rows] == [*rows] and next(iter(rows)) == Row("007", None, 0)


def test_plain_text_has_a_text_per_line(classifier, tmp_path):
    (tmp_path / "texts").write_text("5 6\r\n7, 8\n", encoding="utf-8-sig", newline="")
    assert read(tmp_path / "texts", classifier) == Texts(["5 6", "7, 8"])


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("5 6\n\n7\n", Texts(["5 6", "7"])),
        ("\ufeff5 6\n", Texts(["5 6"])),
        ('{"text": "5 6", "label": "yes"}\n{"text": "7", "label": "no"}\n', Texts(["5 6", "7"], labels=[1, 0])),
        ('{"set"}\n5\n', Texts(['{"set"}', "5"])),
    ],
)
def test_standard_input_is_text_or_json_lines(given, expected, classifier, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(given.encode())))
    source = TextSource("-")
    table = source.open()
    assert table.read(classifier, labels=True) == table.read(classifier, labels=True) == expected
    assert source.name == "standard input"


def test_a_folder_holds_one_kind(classifier, tmp_path, caplog):
    for number, name in enumerate(("b.csv", "a.csv")):
        write(tmp_path / name, {"text": [str(number)], "label": [number]})
    (tmp_path / "README.md").write_text("not data")
    assert read(tmp_path, classifier) == Texts(["1", "0"], labels=[1, 0])
    (tmp_path / ".cache").mkdir()
    write(tmp_path / ".cache" / "x.parquet", {"text": ["9"]})
    assert len(read(tmp_path, classifier)) == 2
    write(tmp_path / "c.jsonl", {"text": ["9"]})
    with pytest.raises(ValueError, match="holds 2 csv, 1 json files; a folder is read that holds one kind"):
        TextSource(str(tmp_path)).open()
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no .csv, .tsv"):
        TextSource(str(tmp_path / "empty")).open()
    assert not caplog.records


def test_files_of_a_folder_may_be_splits(classifier, tmp_path, caplog):
    (tmp_path / "data").mkdir()
    for name in ("train-00000-of-00002", "train-00001-of-00002", "dev", "my_test"):
        write(tmp_path / "data" / f"{name}.parquet", {"text": [name]})
    trained = ["train-00000-of-00002", "train-00001-of-00002"]
    assert read(tmp_path, classifier).texts == trained
    assert "reading split train of validation, test, train" in caplog.text
    assert read(f"{tmp_path}:validation", classifier).texts == ["dev"]
    assert TextSource(f"{tmp_path / 'data'}:test").name.endswith("data:test")
    with pytest.raises(ValueError, match="there is no split eval; there are validation, test, train"):
        TextSource(f"{tmp_path}:eval").open()


# ---- datasets of the Hub


class Hub:
    """What `datasets.load_dataset` is replaced by: datasets by (name, configuration), and which calls it got."""

    def __init__(self, **known):
        self.known, self.calls = known, []

    def __call__(self, name, config=None, *, split=None, streaming=False):
        self.calls.append((name, config, split, streaming))
        if name not in self.known:
            raise DatasetNotFoundError(f"Dataset '{name}' doesn't exist")
        if config not in self.known[name]:
            raise ValueError(f"BuilderConfig {config!r} not found. Available: {list(self.known[name])}")
        found = DatasetDict(self.known[name][config])
        if split is not None and split not in found:
            raise ValueError(f"Unknown split {split!r}. Should be one of {list(found)}.")
        return found if split is None else found[split]


@pytest.fixture
def hub(monkeypatch):
    names = Features({"text": Value("string"), "label": ClassLabel(names=["yes", "NO"])})
    imdb = {part: Dataset.from_dict({"text": [part], "label": [1]}, names) for part in ("train", "test")}
    unlabelled = {"test": Dataset.from_dict({"sentence": ["5"], "label": [-1]})}
    found = Hub(
        imdb={None: imdb},
        glue={"sst2": unlabelled},
        **{"me/imdb": {None: imdb, "small": unlabelled}, "you/parts": {None: {"a": imdb["test"], "b": imdb["test"]}}},
    )
    monkeypatch.setattr(datasets, "load_dataset", found)
    return found


@pytest.mark.parametrize(
    ("path", "calls", "expected"),
    [
        ("imdb", [("imdb", None, None, False)], Texts(["train"], labels=[0])),
        ("imdb:test", [("imdb", None, "test", False)], Texts(["test"], labels=[0])),
        ("glue/sst2:test", [("glue", "sst2", "test", False)], Texts(["5"])),
        (
            "me/imdb:test",
            [("me", "imdb", "test", False), ("me/imdb", None, "test", False)],
            Texts(["test"], labels=[0]),
        ),
        ("me/imdb/small", [("me/imdb", "small", None, False)], Texts(["5"])),
    ],
)
def test_datasets_of_the_hub(path, calls, expected, classifier, hub):
    assert read(path, classifier, labels=expected.labels is not None) == expected
    assert hub.calls == calls and TextSource(path).name == path


def test_what_the_hub_has_not_is_one_line(classifier, hub, tmp_path, monkeypatch, caplog):
    said = {
        "nobody/nothing": "nobody/nothing is no file, no folder and no dataset on the Hub: Dataset 'nobody/nothing'",
        "imdb:half": r"imdb:half cannot be read: Unknown split 'half'. Should be one of \['train', 'test'\]",
        "glue/sst3": "glue/sst3 cannot be read: BuilderConfig 'sst3' not found",
        "you/parts": "you/parts has splits a, b: name one, as you/parts:a",
        "nothing.csv": "nothing.csv is no file, and no folder",
        "/no/where": "/no/where is no file",
    }
    for path, message in said.items():
        with pytest.raises(ValueError, match=message):
            TextSource(path).open()
    with pytest.raises(ValueError, match="row 1 has no label"):
        read("glue/sst2:test", classifier)  # whose labels are -1
    monkeypatch.chdir(tmp_path)
    (tmp_path / "glue").mkdir()
    with pytest.raises(ValueError, match="glue/sst2 is no file"):  # a folder here is no dataset there
        TextSource("glue/sst2").open()


def test_a_local_path_wins(classifier, hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "imdb").mkdir()
    write(tmp_path / "imdb" / "a.csv", {"text": ["5 6"]})
    monkeypatch.setattr(datasets, "load_dataset", datasets.load.load_dataset)  # which opens files, too
    assert read("imdb", classifier, labels=False).texts == ["5 6"] and not hub.calls


def counted(most: int, seen: list[int]) -> IterableDataset:
    def rows():
        for number in range(most):
            seen.append(number)
            yield {"text": f"{3 + number % 90} 5 6 7"}

    return IterableDataset.from_generator(rows)


def test_a_stream_is_read_no_further_than_is_needed(monkeypatch):
    seen: list[int] = []
    calls = []

    def load(name, config=None, *, split=None, streaming=False):
        calls.append((name, split, streaming))
        return counted(100_000, seen)

    monkeypatch.setattr(datasets, "load_dataset", load)
    model, tokenizer = tiny_model("llama", CAUSAL), number_tokenizer()
    table = TextSource("large:train", streaming=True).open()
    assert calls == [("large", "train", True)]
    with pytest.raises(ValueError, match="here all are needed: give --max_rows"):
        table.read(model)
    seen.clear()
    assert len(table.read(model, enough=TokenBudget(tokenizer, 3, 600))) == 256  # a window; 3 of 4 tokens of each
    assert len(seen) <= 2 * 256
    assert len(table.read(model, enough=TokenBudget(tokenizer, 4, 1025))) == 512
    seen.clear()
    assert len(TextSource("large:train", streaming=True, max_rows=5).open().read(model)) == 5 and len(seen) < 12
    seen.clear()
    assert len(table.read(model, most=7)) == 7 and len(seen) < 600


# ---- columns


@pytest.mark.parametrize(
    ("columns", "expected", "said"),
    [
        (("review", "id"), ("review", None), "texts are column review (--text_column)"),
        (("sentence1", "sentence2", "title"), ("sentence1", "sentence2"), "column sentence1 and second texts column"),
        (("question", "sentence"), ("question", "sentence"), "column question and second texts column sentence"),
        (("text", "sentence", "premise", "hypothesis"), ("text", None), None),
    ],
)
def test_a_usual_column_is_taken_where_there_is_no_doubt(columns, expected, said, tmp_path, caplog):
    table = TextSource(write(tmp_path / "a.csv", {name: ["5"] for name in columns})).open()
    assert (table.text, table.pair) == expected
    assert said in caplog.text if said else not caplog.records


def test_columns_that_are_not_there_are_listed(classifier, tmp_path, caplog):
    path = write(tmp_path / "a.jsonl", {"review": ["5"], "content": ["6"], "number": [7]})
    listed = "it has review, content, number"
    with pytest.raises(ValueError, match=f"has no column text; {listed}: name the column of the texts"):
        TextSource(path).open()
    for column in ("text_column", "pair_column", "label_column", "target_column"):
        with pytest.raises(ValueError, match=f"has no column words; {listed}"):
            TextSource(path, **{"text_column": "review", column: "words"}).open()
    with pytest.raises(ValueError, match="row 1 of column number is no text but 7"):
        read(path, classifier, labels=False, text_column="number")
    assert read(path, classifier, text_column="content", label_column="number", labels=False) == Texts(["6"])
    with pytest.raises(ValueError, match="row 1 has label '7', which is none of no, yes"):
        read(path, classifier, text_column="content", label_column="number")
    with pytest.raises(ValueError, match="a LlamaForCausalLM has no use for --label_column"):
        read(path, tiny_model("llama", CAUSAL), text_column="content", label_column="number")
    with pytest.raises(ValueError, match="a BertForSequenceClassification has no use for --target_column"):
        read(path, classifier, text_column="content", target_column="review")
    assert not caplog.records
    assert read(path, classifier, text_column="content") == Texts(["6"])
    assert "has no column label" in caplog.text and "classes are not known" in caplog.text


def test_pairs_are_tokenised_together(classifier, tmp_path):
    path = write(tmp_path / "a.csv", {"text": ["5 6", "7"], "other": ["8", "9 10"]})
    texts = read(path, classifier, pair_column="other")
    assert texts == Texts(["5 6", "7"], pairs=["8", "9 10"])
    tokenizer = number_tokenizer()
    (batch,) = TextBatches(texts, tokenizer, batch_size=2)
    expected = tokenizer(["5 6", "7"], ["8", "9 10"])
    assert sorted(batch["input_ids"].tolist()) == sorted(expected["input_ids"]) == [[5, 6, 8], [7, 9, 10]]


@pytest.mark.parametrize(
    ("names", "expected", "said"),
    [
        (["yes", "No"], [1, 0, 0], None),  # by name
        (["bad", "good"], [0, 1, 1], "classes bad, good are by number the model's no, yes"),
        (["bad", "good", "best"], [0, 1, 1], "classes bad, good, best are by number"),
    ],
)
def test_classes_that_a_table_names(names, expected, said, classifier, tmp_path, caplog):
    features = Features({"text": Value("string"), "label": ClassLabel(names=names)})
    path = str(tmp_path / "a.parquet")
    Dataset.from_dict({"text": ["5", "6", "7"], "label": [0, 1, 1]}, features).to_parquet(path)
    assert read(path, classifier).labels == expected
    assert said in caplog.text if said else not caplog.records
    Dataset.from_dict({"text": ["5", "6"], "label": [0, len(names) - 1]}, features).to_parquet(path)
    if len(names) == 3:
        with pytest.raises(ValueError, match="row 2 has label '2', which is none of no, yes"):
            read(path, classifier)


@pytest.mark.parametrize(("labels", "expected"), [([True, False], [1, 0]), ([1.0, 0.0], [1, 0]), ([1, 0], [1, 0])])
def test_class_ids_may_be_any_numbers(labels, expected, classifier, tmp_path):
    path = write(tmp_path / "a.parquet", {"text": ["5", "6"], "label": labels})
    assert read(path, classifier).labels == expected


# ---- what is left out, and what is wrong


def test_empty_and_long_texts_are_counted(classifier, tmp_path, caplog):
    path = write(tmp_path / "a.jsonl", {"text": ["5", " ", None, "6 7 8", "9 10"], "label": [0, 0, None, 1, 1]})
    texts = read(path, classifier)
    assert texts == Texts(["5", "6 7 8", "9 10"], labels=[0, 1, 1])
    batches = TextBatches(texts, number_tokenizer(), max_length=2, batch_size=1)
    assert [*batches] and [*batches]
    assert [record.message for record in caplog.records] == [
        f"2 of 5 rows of {path} have no text: they are left out",
        "1 of 3 texts were cut to 2 tokens (--max_length)",
    ]
    with pytest.raises(ValueError, match="holds no text"):
        read(write(tmp_path / "b.csv", {"text": [" "]}), classifier)


def test_texts_that_are_enough_are_not_said_to_be_empty(classifier, tmp_path, caplog):
    assert len(read(write(tmp_path / "a.csv", {"text": ["5"] * 9}), classifier, max_rows=3, labels=False)) == 3
    assert not caplog.records


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", b'{"text": "5"}\n5 6\n', "a.jsonl cannot be read: JSON parse error"),
        ("a.parquet", b"text\n5 6 7 8\n", "a.parquet cannot be read: Parquet magic bytes not found"),
        ("a.csv", b"text\n5, 6\n", "row 1 has more cells than the header"),
        ("a.csv", b"text,x\n5,6\n7,8,9\n", "Expected 2 fields in line 3, saw 3"),
        ("a.csv", b"", "a.csv holds nothing"),
        ("a.txt", b"", "a.txt holds no text"),
        ("a.xlsx", b"PK", "a.xlsx is a .xlsx file; what is read is .csv, .tsv"),
        ("a.jsonl", '{"text": "é"}'.encode("latin-1"), "a.jsonl is not UTF-8 text: save it as UTF-8"),
        ("a.txt", b"5 6\n" * 9999 + b"\xe9\n", "a.txt is not UTF-8 text: save it as UTF-8"),
        ("a.txt", b"BZh91AY&SY\xe9", "a.txt is not UTF-8 text: unpack it first"),
    ],
)
def test_a_file_that_is_not_what_its_name_says_is_one_line(name, content, said, classifier, tmp_path, capfd):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=said):
        read(tmp_path / name, classifier)
    assert not capfd.readouterr().err.strip()


def test_a_character_may_lie_where_the_first_part_of_a_file_ends(classifier, tmp_path):
    (tmp_path / "a.txt").write_text("x" * 4095 + "é\n")
    assert len(read(tmp_path / "a.txt", classifier).texts[0]) == 4096


# ---- targets


def test_a_decoder_reads_the_target(t5, tmp_path, caplog):
    path = write(tmp_path / "a.csv", {"text": ["5 6 7", "8", "9"], "target": ["10", "11 12", " "]})
    texts = read(path, t5)
    assert texts == Texts(["5 6 7", "8"], targets=["10", "11 12"])
    (batch,) = TextBatches(texts, number_tokenizer(), decoder_start=0)
    assert sorted(batch["labels"].tolist()) == [[10, -100], [11, 12]]
    assert "decoder_input_ids" not in batch and t5(**batch).logits.shape[:2] == (2, 2)
    assert read(path, tiny_model("t5")) == Texts(["5 6 7", "8", "9"])  # it writes nothing
    path = write(tmp_path / "b.parquet", {"document": ["5"], "summary": ["6"], "label": [3]})
    caplog.clear()
    assert read(path, t5) == Texts(["5"], targets=["6"])
    assert "targets are column summary (--target_column)" in caplog.text
    assert read(path, t5, target_column="document", text_column="summary") == Texts(["6"], targets=["5"])


def test_commands_on_an_encoder_decoder_with_targets(t5, tmp_path, capsys, monkeypatch):
    folder = save(t5, tmp_path / "dense")
    rows = words(80).splitlines()
    path = write(tmp_path / "a.jsonl", {"source": rows, "target": [row[:5] for row in rows]})
    settings = ["--data", path, "--expert_size", "8", "--k", "3", "--force"]
    main(["convert", str(folder), str(tmp_path / "moe"), *settings])
    assert "predicted: loss" in capsys.readouterr().out  # that of the targets
    figures = tmp_path / "sweep.json"
    main(["sweep", str(tmp_path / "moe"), "--data", path, "--k", "3", "--controls", "--output", str(figures)])
    found = json.loads(figures.read_text())
    assert found["facts"]["quality"] == "accuracy"
    tokenizer = number_tokenizer()
    targets = tokenizer([row[:5] for row in rows])["input_ids"]
    assert found["facts"]["positions"] == sum(map(len, targets))
    (tmp_path / "texts.txt").write_text("\n".join(rows))
    said = refused(capsys, "sweep", tmp_path / "moe", "--data", tmp_path / "texts.txt")
    assert "has no column target; it has text (--target_column names another)" in said


# ---- commands


def test_sweep_uses_the_labels_of_any_table(tmp_path, capsys):
    model = tiny_model("bert", CLASSIFIER, id2label={0: "no", 1: "yes"})
    convert(model, k=2)
    folder = save(model, tmp_path / "moe")
    columns = {"review": [f"{n} {n + 1}" for n in range(3, 43)], "label": ["no", "yes"] * 20}
    found = []
    for name in ("a.tsv", "a.jsonl", "a.parquet"):
        output = tmp_path / f"{name}.json"
        command = ["sweep", str(folder), "--data", write(tmp_path / name, columns), "--k", "2", "--controls"]
        main([*command, "--output", str(output)])
        found.append(json.loads(output.read_text()))
    assert found[0]["facts"]["quality"] == "accuracy" and found[0]["rows"] == found[1]["rows"] == found[2]["rows"]
    main([*command, "--streaming", "--max_rows", "10", "--output", str(output)])
    assert json.loads(output.read_text())["facts"]["positions"] == 10
    said = refused(capsys, *command, "--streaming")
    assert "with --streaming only some rows are read, and here all are needed: give --max_rows" in said


def test_convert_takes_a_stream_as_far_as_it_calibrates(tmp_path, monkeypatch, capsys):
    folder, seen = save(tiny_model("llama-without-biases", CAUSAL), tmp_path / "dense"), []
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: counted(20_000, seen))
    settings = ["--streaming", "--expert_size", "8", "--k", "3", "--calibration_tokens", "1500", "--force"]
    main(["convert", str(folder), str(tmp_path / "moe"), "--data", "me/large:train", *settings])
    assert len(set(seen)) <= 3 * 256
    assert read_facts(tmp_path / "moe")["calibration"] == {"data": "me/large:train"}


def test_convert_reads_standard_input(tmp_path, monkeypatch, capsys):
    folder = save(tiny_model("llama-without-biases", CAUSAL), tmp_path / "dense")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(words(60).encode())))
    settings = ["--expert_size", "8", "--k", "3", "--allocation", "uniform", "--force"]
    main(["convert", str(folder), str(tmp_path / "moe"), "--data", "-", *settings])
    assert (tmp_path / "moe" / "config.json").exists()


@pytest.mark.parametrize("command", ["convert", "profile", "sweep", "analyze", "ablate", "prune", "export", "bench"])
def test_commands_take_the_fields_of_a_source(command):
    flags = vars(parser([command])._subparsers._group_actions[0].choices[command])["_option_string_actions"]
    known = {f"--{field.name}" for field in fields(TextSource) if field.name != "path"}
    unused = {"--label_column", "--target_column"}
    assert "--data" in flags and known - unused <= flags.keys()


def test_max_rows_is_positive():
    with pytest.raises(ValueError, match="max_rows must be positive, got 0"):
        TextSource("a.csv", max_rows=0)


def test_rows_keep_their_columns():
    texts = Texts.of([Row("a", "b", 1, "c"), Row("d", "", 0, "e")])
    assert texts == Texts(["a", "d"], ["b", ""], [1, 0], ["c", "e"]) and len(Texts.of([])) == 0
    assert texts.select([1]) == Texts(["d"], [""], [0], ["e"])
