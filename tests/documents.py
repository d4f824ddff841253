"""Reads and writes parts of Markdown pages."""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


def fenced(text: str, language: str) -> list[str]:
    """Return the code blocks of a page that are marked with a language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def table(rows: Iterable[Mapping[str, str]]) -> str:
    """Return rows with the same keys as a Markdown table."""
    rows = list(rows)
    lines = [rows[0].keys(), ["---"] * len(rows[0]), *(row.values() for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def times(ratio: float, digits: int = 1) -> str:
    return f"{ratio:.{digits}f}x"
