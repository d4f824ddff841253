"""The parsing, splitting and caching of packaged inputs, on small files made here: nothing is downloaded."""

import csv
import dataclasses
import gzip
import io
import random
import struct
import sys
import tarfile
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from moefy_hf.recipes import input_files, inputs

RATINGS = "\r\n".join(
    [
        "1\t2.25\tA ''warm'', funny film.",
        "2\t-0.4\tIt exists.",
        '3\t-3.1\tHe said "no" and\tleft; the clichés stayed.',
        "4\t0.5\tExactly at the threshold\x85 and with a control character that str.splitlines would break at.",
        "5\t-0.5\tLikewise.",
    ]
)
ROWS = [(f"text {index}", "rare" if index % 10 == 0 else "common") for index in range(200)]


@pytest.fixture
def toy(monkeypatch, tmp_path):
    """A registry with the one input `toy`, whose package is a wheel made here; counts how often it is fetched."""
    members = tmp_path / "members"
    members.mkdir()
    (members / "a.txt").write_text("alpha\r\n\x1a", newline="")
    (members / "b.txt").write_text("beta", newline="")
    fetched = []

    def fetch(source, into):
        fetched.append(source.package)
        with zipfile.ZipFile(into / "toy.whl", "w") as wheel:
            for path in members.iterdir():
                wheel.write(path, f"toy/data/{path.name}")
            wheel.writestr("toy/code.py", "")
        return into / "toy.whl"

    source = inputs.Source(
        "wheel", "toy==1", ("data/*.txt",), inputs.digest(members), input_files.convert_prose, "letters; 1 kB"
    )
    monkeypatch.setattr(inputs, "PACKAGED", {"toy": source})
    monkeypatch.setattr(inputs, "fetch", fetch)
    return fetched


def left_in(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.iterdir() if path.name != ".lock")


# ---- parsing


def test_ratings():
    rows = input_files.read_ratings(line + "\n" for line in RATINGS.split("\n"))
    assert [label for _, label in rows] == ["positive", "negative", "positive", "negative"]
    assert rows[0][0] == "A ''warm'', funny film."
    assert rows[1][0] == 'He said "no" and\tleft; the clichés stayed.'
    assert "\x85 and" in rows[2][0]


def test_tab_with_awkward_quoting(tmp_path):
    path = tmp_path / "toy.tab"
    long = "word " * 50_000  # beyond csv's default field limit
    body = f'x\tplain\ny\t"a ""quoted"", one\tover\ntwo lines"\n\nx\tit\'s 5" wide\ny\t{long}\n'
    path.write_text("Category\tText\nd\tstring\nclass\t\n\n" + body, encoding="utf-8")
    with path.open(encoding="utf-8", newline="") as file:
        rows = input_files.read_tab(file)
    assert rows == [("plain", "x"), ('a "quoted", one\tover\ntwo lines', "y"), ("it's 5\" wide", "x"), (long, "y")]


def test_tab_columns_come_from_the_header():
    lines = ["Text\tId\tCategory\n", "string\tc\td\n", "\tmeta\tclass\n", "hello\t7\tgreeting\n"]
    assert input_files.read_tab(lines) == [("hello", "greeting")]


def test_tagged_words():
    lines = ["It/PRP is/VBZ 1&slash;2/CD ,/, he/PRP said/VBD ./."] * 12 + ["", "Odd/NN|JJ ./."]
    rows = input_files.read_tagged(lines)
    assert len(rows) == 12 and rows[0] == (
        ["It", "is", "1/2", ",", "he", "said", "."],
        ["PRP", "VBZ", "CD", ",", "PRP", "VBD", "."],
    )


def test_gaps_have_one_answer():
    text = "We met in Paris. We left in June. They say that Paris is large. The end was near. " * 2
    first, second = input_files.cloze(text, random.Random(0))  # Paris is there twice, "We" begins a sentence
    assert first == second and first["question"] == "We left in ____."
    start = first["answers"]["answer_start"][0]
    assert first["context"][start:].startswith("June.") and first["answers"]["text"] == ["June"]
    assert input_files.cloze("Nothing is here. It is so. It is. No name is here.", random.Random(0)) == []


def test_drop_empty_says_how_many(capsys):
    rows = [(" kept ", "a"), ("  ", "a"), ("unlabelled", ""), ("kept", "b")]
    assert input_files.drop_empty(rows, "toy") == [("kept", "a"), ("kept", "b")]
    assert "dropped 2 of 4 rows" in capsys.readouterr().err


def test_idx(tmp_path):
    pixels = np.arange(2 * 3 * 4, dtype=np.uint8).reshape(2, 3, 4)
    header = bytes([0, 0, 8, 3]) + struct.pack(">3i", 2, 3, 4)
    (tmp_path / "images.gz").write_bytes(gzip.compress(header + pixels.tobytes()))
    assert np.array_equal(input_files.read_idx(tmp_path / "images.gz"), pixels)


# ---- splitting and writing


def test_stratified_split_partitions_in_proportion():
    train, held_out = input_files.stratified_split(ROWS, 0.1)
    assert len(held_out) == 20 and sum(label == "rare" for _, label in held_out) == 2
    assert not set(train) & set(held_out)
    assert sorted(train + held_out) == sorted(ROWS)


def test_stratified_split_is_seeded():
    assert input_files.stratified_split(ROWS, 0.1) == input_files.stratified_split(ROWS, 0.1)
    assert input_files.stratified_split(ROWS, 0.1) != input_files.stratified_split(ROWS, 0.1, seed=1)


def test_a_class_of_one_row_stays_in_train():
    train, held_out = input_files.stratified_split([*ROWS, ("alone", "single")], 0.1)
    assert ("alone", "single") in train and len(train) + len(held_out) == 201


def test_movie_end_to_end(tmp_path):
    from datasets import load_dataset

    raw, out, texts = (tmp_path / part for part in ("raw", "out", "hutto_ICWSM_2014"))
    for directory in (raw, out, texts):
        directory.mkdir()
    lines = [f'{i}\t{(-1) ** i * (1 + i % 3)}\tn° {i}\x85, with "quotes", commas\r\n' for i in range(100)]
    (texts / "movieReviewSnippets_GroundTruth.txt").write_text("".join(lines), encoding="utf-8", newline="")
    with tarfile.open(raw / "hutto_ICWSM_2014.tar.gz", "w:gz") as tar:
        tar.add(texts, texts.name)
    input_files.convert_movie(raw, out)
    files = {split: str(out / f"{split}.csv") for split in ("train", "validation", "test")}
    data = load_dataset("csv", data_files=files, cache_dir=str(tmp_path / "arrow"))
    assert {split: len(rows) for split, rows in data.items()} == {"train": 80, "validation": 10, "test": 10}
    for rows in data.values():
        assert rows.column_names == ["text", "label"] and rows["label"].count("positive") == len(rows) // 2
    texts = [text for rows in data.values() for text in rows["text"]]
    assert sorted(texts) == sorted(line.split("\t")[2].strip() for line in lines)


def test_tab_end_to_end(tmp_path):
    header = "Category\tText\nd\tstring\nclass\t\n\n"
    for split in ("train", "test"):
        body = "".join(f"{label}\t{split} {text}\n" for text, label in ROWS) + "\t\n"
        (tmp_path / f"toy-{split}.tab").write_text(header + body)
    out = tmp_path / "out"
    out.mkdir()
    assert input_files.convert_tab(tmp_path, out) == "180 train, 20 validation, 200 test rows, 2 classes"
    with (out / "test.csv").open(encoding="utf-8", newline="") as file:
        assert [(row["text"], row["label"]) for row in csv.DictReader(file)] == [("test " + t, c) for t, c in ROWS]


# ---- unpacking and resolving


@pytest.mark.parametrize("suffix", [".whl", ".tar.gz", ".tgz"])
def test_unpack_takes_what_matches_and_writes_nowhere_else(tmp_path, suffix):
    members = {"p/data/a.txt": "a", "p/data/deep/b.txt": "b", "p/code.txt": "c", "../data/evil.txt": "d"}
    archive, into = tmp_path / f"p{suffix}", tmp_path / "nested" / "into"
    into.mkdir(parents=True)
    if suffix == ".whl":
        with zipfile.ZipFile(archive, "w") as wheel:
            for name, text in members.items():
                wheel.writestr(name, text)
    else:
        with tarfile.open(archive, "w:gz") as tar:
            for name, text in members.items():
                member = tarfile.TarInfo(name)
                member.size = len(text)
                tar.addfile(member, io.BytesIO(text.encode()))
    input_files.unpack(archive, ("data/*.txt",), into)
    assert left_in(into) == ["a.txt", "evil.txt"] and (into / "a.txt").read_text() == "a"
    assert not (tmp_path / "nested" / "data").exists()


@pytest.mark.parametrize("name", ["google-bert/bert-base-uncased", "./runs/dense", "/data/movie", "movie"])
def test_other_strings_are_returned_unchanged(name, tmp_path, monkeypatch):
    monkeypatch.setenv("MOEFY_CACHE", str(tmp_path / "cache"))
    assert inputs.resolve(name) == name and not (tmp_path / "cache").exists()


def test_unknown_names_raise_with_the_valid_ones(tmp_path):
    with pytest.raises(ValueError) as error:
        inputs.resolve("package:imdb", tmp_path)
    assert "package:imdb" in str(error.value)
    for name in inputs.PACKAGED:
        assert f"package:{name}" in str(error.value)


def test_materialises_once(toy, tmp_path):
    cache = tmp_path / "cache"
    first = inputs.resolve("package:toy", cache)
    assert first == str(cache / "toy") and left_in(cache) == ["toy"]
    assert left_in(cache / "toy") == ["SOURCE.md", "a.txt", "b.txt"]
    assert (cache / "toy" / "a.txt").read_bytes() == b"alpha\n"
    assert "toy==1" in (cache / "toy" / "SOURCE.md").read_text()
    assert inputs.resolve("package:toy", cache) == first and toy == ["toy==1"]


def test_processes_at_once_fetch_once(toy, tmp_path):
    with ThreadPoolExecutor(4) as pool:
        paths = set(pool.map(lambda _: inputs.resolve("package:toy", tmp_path / "cache"), range(4)))
    assert paths == {str(tmp_path / "cache" / "toy")} and toy == ["toy==1"]
    assert left_in(tmp_path / "cache") == ["toy"]


def test_cache_comes_from_the_environment(toy, tmp_path, monkeypatch):
    monkeypatch.setenv("MOEFY_CACHE", str(tmp_path / "elsewhere"))
    assert inputs.resolve("package:toy") == str(tmp_path / "elsewhere" / "toy")


def test_inputs_of_one_package_share_its_archive(toy, tmp_path):
    inputs.PACKAGED["again"] = inputs.PACKAGED["toy"]
    for name in ("toy", "again"):
        inputs.resolve(f"package:{name}", tmp_path / "cache")
    assert toy == ["toy==1"] and left_in(tmp_path / "cache") == ["again", "archives", "toy"]


def test_wrong_files_are_refused_and_leave_nothing(toy, tmp_path):
    inputs.PACKAGED["toy"] = dataclasses.replace(inputs.PACKAGED["toy"], sha256="0" * 64)
    inputs.PACKAGED["again"] = inputs.PACKAGED["toy"]  # shared archives are not kept unverified either
    with pytest.raises(RuntimeError, match=f"toy==1 have sha256 [0-9a-f]{{64}}, expected {'0' * 64}"):
        inputs.resolve("package:toy", tmp_path / "cache")
    assert left_in(tmp_path / "cache") == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_an_interruption_leaves_nothing(toy, tmp_path, error):
    def convert(raw, out):
        (out / "half.txt").write_text("written")
        raise error

    whole = inputs.PACKAGED["toy"]
    inputs.PACKAGED["toy"] = dataclasses.replace(whole, convert=convert)
    with pytest.raises(error):
        inputs.resolve("package:toy", tmp_path / "cache")
    assert left_in(tmp_path / "cache") == []
    inputs.PACKAGED["toy"] = whole
    assert Path(inputs.resolve("package:toy", tmp_path / "cache")).is_dir()


def test_missing_programs_are_named(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    for kind, program in (("npm", "npm"), ("deb", "apt-get")):
        source = inputs.Source(kind, "toy", (), "", input_files.convert_prose, "")
        with pytest.raises(RuntimeError, match=f"'{program}'"):
            inputs.fetch(source, tmp_path)


def test_failing_programs_are_quoted(tmp_path):
    with pytest.raises(RuntimeError, match="(?s)failed .3.:\nno such package"):
        input_files.run(sys.executable, "-c", "print('no such package'); raise SystemExit(3)", cwd=tmp_path)


@pytest.mark.parametrize("name", inputs.PACKAGED)
def test_every_source_is_pinned(name):
    source = inputs.PACKAGED[name]
    assert source.kind in ("wheel", "sdist", "npm", "deb") and len(source.sha256) == 64
    assert (source.kind == "sdist") == ("--hash=sha256:" in source.package)
    assert source.kind == "deb" or source.release[1:].partition("==" if source.kind != "npm" else "@")[2]


def test_command_line(toy, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["inputs.py", "toy", "--cache-dir", str(tmp_path / "cache")])
    inputs.main()
    assert capsys.readouterr().out.split() == [str(tmp_path / "cache" / "toy")]
    monkeypatch.setattr(sys, "argv", ["inputs.py", "--list"])
    inputs.main()
    assert "toy" in capsys.readouterr().out and toy == ["toy==1"]


def test_command_line_names_what_is_wrong(toy, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["inputs.py", "imdb", "--cache-dir", str(tmp_path / "cache")])
    with pytest.raises(SystemExit, match="Unknown 'package:imdb'; valid are package:toy"):
        inputs.main()
