"""Folders and files that are there whole or not at all, tables, and names on the Hub."""

import contextlib
import csv
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .errors import MoefyError

PICTURES = (".png", ".pdf", ".svg")  # the formats of plots


@contextlib.contextmanager
def written_whole(folder: Path) -> Iterator[Path]:
    """Make a folder beside `folder` to write to, which becomes `folder` at the end unless something fails.

    Args:
        folder: absent, or empty.
    """
    temporary = folder.with_name(f".{folder.name}.unfinished")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        if folder.exists():
            folder.rmdir()
        temporary.rename(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


@contextlib.contextmanager
def written_file(path: Path) -> Iterator[Path]:
    """Give a name beside `path` to write to, which becomes `path` at the end unless something fails."""
    temporary = path.with_name(f".{path.name}.unfinished")
    try:
        yield temporary
        temporary.rename(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_whole(path: Path, text: str) -> None:
    """Write a text file under a temporary name, and rename it: it is never there in part."""
    with written_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def check_files(*paths: str | None, plot: str | None) -> None:
    """Check, before the work whose figures they get, that files can be written.

    Args:
        paths: of files; None stands for none.
        plot: of a picture, or None.

    Raises:
        MoefyError: a file cannot be written, or the picture without matplotlib.
    """
    for path in filter(None, (*paths, plot)):
        folder = Path(path).absolute().parent
        if not folder.is_dir():
            raise MoefyError(f"there is no folder for {path}")
        if Path(path).is_dir() or not os.access(path if Path(path).exists() else folder, os.W_OK):
            raise MoefyError(f"{path} cannot be written")
    if plot and find_spec("matplotlib") is None:
        raise MoefyError("--plot needs matplotlib: pip install 'moefy-hf[plots]'")
    if plot and Path(plot).suffix not in PICTURES:
        raise MoefyError(f"--plot draws {', '.join(PICTURES)}, got {plot}")


def markdown(rows: list[dict[str, Any]]) -> str:
    """Return rows of equal keys as a Markdown table; numbers have four digits."""

    def cell(value: Any) -> str:
        return "" if value is None else f"{value:.4g}" if isinstance(value, float) else f"{value}"

    lines = ["| " + " | ".join(rows[0]) + " |", "|---" * len(rows[0]) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(map(cell, row.values())) + " |" for row in rows)])


def write_csv(path: str, columns: Sequence[str], rows: Iterable[Sequence]) -> None:
    """Write a csv file.

    Args:
        path: of the file.
        columns: their names, the first line.
        rows: the values of the other lines.
    """
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(rows)


def is_hub_id(name: str) -> bool:
    """Return whether a name can be that of a repository: 'owner/name', and no folder here."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None and not name.startswith(".") and not Path(name).exists()
