"""Finds what `--data` names, and opens it with `datasets`, which is imported only then: that takes seconds."""

import codecs
import contextlib
import glob
import json
import logging
import re
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import MoefyError
from .texts import say

STANDARD_INPUT = "-"
CSV, JSON, PARQUET, TEXT = "csv", "json", "parquet", "text"  # as `datasets` calls them
TSV = "tsv"
KINDS = {".csv": CSV, ".tsv": TSV, ".json": JSON, ".jsonl": JSON, ".ndjson": JSON, ".parquet": PARQUET, ".txt": TEXT}
IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
OTHER_TABLES = (".arrow", ".xlsx", ".xls", ".ods", ".feather", ".pkl")
SPLITS = {  # words in names of files -> the split that they are of
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
}
ENCODE = "save it as UTF-8 (iconv -f latin1 -t utf-8, or -f utf-16)"
HUB_NAME = re.compile(r"([\w-][\w.-]*(?:/[\w.+-]+){0,2})(?::([^:/]+))?")


@dataclass(frozen=True)
class Opened:
    """A dataset, of which nothing may have been read yet.

    Attributes:
        dataset: a `datasets.Dataset` or `IterableDataset`.
        columns: name -> feature, which is None where the dataset does not know it.
        table: whether it has columns of its own; otherwise a text per line.
        kept: files that are there as long as this is.
    """

    dataset: Any
    columns: Mapping[str, Any]
    table: bool = True
    kept: Any = None


def open_dataset(path: str, streaming: bool) -> Opened:
    """Open a file, a folder of files, standard input or a dataset of the Hub.

    Args:
        path: what names it; what exists on this machine wins over a name on the Hub.
        streaming: download no more of a dataset than is read.

    Raises:
        MoefyError: there is nothing of this name, or nothing that can be read.
    """
    with said_plainly(path):
        if path == STANDARD_INPUT:
            file, kind = standard_input()
            return open_files({"train": [Path(file.name)]}, kind, "train", kept=file)
        if Path(path).is_file():
            return open_files({"train": [Path(path)]}, kind_of(path), "train")
        folder, _, split = (path, "", "") if Path(path).is_dir() else path.rpartition(":")
        if not folder or not Path(folder).is_dir():
            return open_hub(path, streaming)
        if holds_images(Path(folder)):
            return open_images(folder, split)
        files, kind = files_of(Path(folder))
        return open_files(files, kind, split or chosen_split(folder, files))


def kind_of(path: str) -> str:
    """Return what is in a file, by its name: anything that is no table is plain text.

    Raises:
        MoefyError: a table that is not read.
    """
    suffix = Path(path).suffix.lower()
    if suffix in OTHER_TABLES:
        raise MoefyError(f"{path} is a {suffix} file; what is read is {', '.join(KINDS)} and plain text")
    return KINDS.get(suffix, TEXT)


def shown_in(folder: Path) -> list[Path]:
    """Return what is in a folder and the folders in it, but what is hidden."""
    found = (path.relative_to(folder) for path in sorted(folder.rglob("*")))
    return [path for path in found if not any(part.startswith(".") for part in path.parts)]


def holds_images(folder: Path) -> bool:
    """Return whether a folder holds images, and no tables but what `datasets` reads beside them, metadata.csv."""
    suffixes = {path.suffix.lower() for path in shown_in(folder) if path.stem != "metadata"}
    return bool(suffixes & {*IMAGES}) and not suffixes & {*KINDS}


def open_images(folder: str, split: str) -> Opened:
    """Open a folder of images, as `datasets` has it: a folder per split, if there are several, and in it per class.

    Raises:
        MoefyError: no such split.
    """
    from datasets import load_dataset

    splits = load_dataset("imagefolder", data_dir=folder, streaming=True)
    split = split or chosen_split(folder, splits)
    check_split(split, splits)
    return opened(splits[split])


def check_split(split: str, splits: Mapping[str, Any]) -> None:
    """Check that there is a split.

    Raises:
        MoefyError: there is none; those that there are are named.
    """
    if split not in splits:
        raise MoefyError(f"there is no split {split}; there are {', '.join(splits)}")


def files_of(folder: Path) -> tuple[dict[str, list[Path]], str]:
    """Return the files of a folder by split, and their kind. Where not all names say a split, all are of "train".

    Raises:
        MoefyError: there are files of several kinds, or none.
    """
    files = [path for path in shown_in(folder) if path.suffix.lower() in KINDS]
    kinds = Counter(KINDS[path.suffix.lower()] for path in files)
    if len(kinds) != 1:
        held = ", ".join(f"{count} {kind}" for kind, count in kinds.items()) or f"no {', '.join(KINDS)}"
        raise MoefyError(f"{folder} holds {held} files; a folder is read that holds one kind")
    splits: dict[str, list[Path]] = {}
    for path in files:
        words = re.split(r"[^a-z]+", str(path.with_suffix("")).lower())
        split = next((SPLITS[word] for word in reversed(words) if word in SPLITS), None)
        splits.setdefault(split or "", []).append(folder / path)
    if "" in splits:
        splits = {"train": [folder / path for path in files]}
    return splits, next(iter(kinds))


def open_files(splits: Mapping[str, list[Path]], kind: str, split: str, kept: Any = None) -> Opened:
    """Open files of one kind, without copying them.

    Args:
        splits: split -> files.
        kind: of all of them.
        split: that is read.
        kept: what has to be there as long as they are read.

    Raises:
        MoefyError: no such split, or a file that is not in UTF-8.
    """
    from datasets import load_dataset

    check_split(split, splits)
    settings: dict[str, Any] = {}
    if kind != PARQUET:
        for file in splits[split]:
            check_utf8(file)
    if kind == TEXT:
        settings["encoding"] = "utf-8-sig"
    if kind in (CSV, TSV):
        settings = csv_settings(splits[split][0], "\t" if kind == TSV else ",")
    files = {split: [glob.escape(str(file)) for file in splits[split]]}
    loaded = load_dataset(CSV if kind == TSV else kind, data_files=files, split=split, streaming=True, **settings)
    return Opened(loaded, {"text": None}, False, kept) if kind == TEXT else opened(loaded, kept)


def open_hub(path: str, streaming: bool) -> Opened:
    """Open a dataset of the Hub: NAME, NAME/CONFIG, OWNER/NAME or OWNER/NAME/CONFIG, and :SPLIT behind it.

    Of two parts the first is asked for as the name of a dataset without an owner, of which no user can make one.

    Raises:
        MoefyError: there is no such dataset, configuration or split.
    """
    match = HUB_NAME.fullmatch(path)
    parts = match[1].split("/") if match else []
    if not match or Path(path).suffix.lower() in (*KINDS, *OTHER_TABLES) or Path(parts[0]).exists():
        raise MoefyError(f"{path} is no file, and no folder")
    from datasets import load_dataset

    names: list[tuple[str, str | None]] = [("/".join(parts[:2]), parts[2] if len(parts) == 3 else None)]
    if len(parts) == 2:
        names.insert(0, (parts[0], parts[1]))
    for name, config in names:
        try:
            loaded = load_dataset(name, config, split=match[2], streaming=streaming)
            break
        except (FileNotFoundError, ConnectionError) as error:  # the next one may be there
            if (name, config) == names[-1]:
                raise MoefyError(f"{path} is no file, no folder and no dataset on the Hub: {error}") from error
    if isinstance(loaded, dict):
        loaded = loaded[chosen_split(path, loaded)]
    return opened(loaded)


def chosen_split(name: str, splits: Mapping[str, Any]) -> str:
    """Return the only split or, where there are several, "train", which is said.

    Raises:
        MoefyError: there are several, and none is "train".
    """
    if len(splits) == 1:
        return next(iter(splits))
    if "train" not in splits:
        raise MoefyError(f"{name} has splits {', '.join(splits)}: name one, as {name}:{next(iter(splits))}")
    say(f"{name}: reading split train of {', '.join(splits)} (:SPLIT behind the name takes another)")
    return "train"


def opened(dataset: Any, kept: Any = None) -> Opened:
    """Return a table with its columns, for which a first row is read where it does not know them."""
    return Opened(dataset, dict(dataset.features or dict.fromkeys(next(iter(dataset), {}))), kept=kept)


def csv_settings(path: Path, separator: str) -> dict[str, Any]:
    """Return how a csv file is read: every cell as the text that it is, "None" and "007" too.

    Raises:
        MoefyError: it is empty, or its rows are longer than its header.
    """
    import pandas
    from datasets import Features, Value

    settings: dict[str, Any] = {"sep": separator, "encoding": "utf-8-sig", "keep_default_na": False}
    try:
        head = pandas.read_csv(path, nrows=1, dtype=str, **settings)
    except pandas.errors.EmptyDataError:
        raise MoefyError(f"{path} holds nothing") from None
    if not isinstance(head.index, pandas.RangeIndex):
        raise MoefyError(f"{path}: row 1 has more cells than the header: put texts with a {separator!r} in quotes")
    return settings | {"features": Features({str(name): Value("string") for name in head.columns})}


def standard_input() -> tuple[Any, str]:
    """Copy standard input to a file, because it is read more than once; return the file and its kind."""
    file = tempfile.NamedTemporaryFile()  # goes when nobody has it
    shutil.copyfileobj(sys.stdin.buffer, file)
    file.flush()
    with open(file.name, encoding="utf-8-sig", errors="replace") as lines:
        first = next((line for line in lines if line.strip()), "")
    with contextlib.suppress(ValueError):
        if isinstance(json.loads(first), dict):
            return file, JSON
    return file, TEXT


def check_utf8(path: Path) -> None:
    """Check the beginning of a file that should be text in UTF-8.

    Raises:
        MoefyError: it is in another encoding, or compressed.
    """
    with open(path, "rb") as raw:
        start = raw.read(4096)
    packed = start[:2] in (b"\x1f\x8b", b"PK", b"BZ", b"\xfd7", b"(\xb5")
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(start, final=len(start) < 4096)
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:  # UTF-16 without a mark is valid UTF-8
        raise MoefyError(f"{path} is not UTF-8 text: {'unpack it first' if packed else ENCODE}")


@contextlib.contextmanager
def said_plainly(name: str) -> Iterator[None]:
    """Turn what `datasets` finds wrong into one line, which is not logged beside.

    Raises:
        MoefyError: that line.
    """
    import pyarrow

    logging.getLogger("datasets.packaged_modules").setLevel("CRITICAL")  # they log what they raise
    try:
        yield
    except MoefyError:
        raise
    except UnicodeDecodeError as error:
        raise MoefyError(f"{name} is not UTF-8 text: {ENCODE}") from error
    except (ValueError, TypeError, LookupError, RuntimeError, OSError, pyarrow.ArrowException) as error:
        raise MoefyError(f"{name} cannot be read: {error}") from error
