"""Which column of a table is what."""

from collections.abc import Iterable, Mapping
from typing import Any

from ..errors import MoefyError
from .texts import say

PAIRS = (  # columns that are usually read together
    *(("sentence1", "sentence2"), ("premise", "hypothesis"), ("question1", "question2"), ("text1", "text2")),
    *(("question", "sentence"), ("question", "context"), ("question", "passage"), ("query", "passage")),
)
TEXTS = (
    *("sentence", "review", "content", "document", "article", "dialogue", "comment", "tweet", "body", "prompt"),
    *("question", "premise", "source", "input"),
)
LABELS = ("labels", "class")
TARGETS = ("label", "summary", "highlights", "translation", "answer", "output", "response")


def is_text(feature: Any) -> bool:
    """Return whether a column can hold texts; `feature` is None where the dataset does not know."""
    return feature is None or getattr(feature, "dtype", None) in ("string", "large_string")


def is_image(feature: Any) -> bool:
    """Return whether a column holds images, also in a file whose writer did not say so."""
    return getattr(feature, "_type", None) == "Image" or isinstance(feature, dict) and {*feature} == {"bytes", "path"}


def text_columns(
    table: str, columns: Mapping[str, Any], text: str | None, pair: str | None, others: Iterable[str | None]
) -> tuple[str, str | None]:
    """Return the columns of texts and of second texts, if there are any.

    Args:
        table: what it is called.
        columns: name -> feature.
        text, pair: columns that a user named.
        others: columns that are something else.

    Raises:
        MoefyError: there is no column `text`, nor exactly one that is usual.
    """
    if text or "text" in columns:
        return text or "text", pair
    usable = [name for name, feature in columns.items() if is_text(feature) and name not in (pair, *others)]
    pairs = [(one, two) for one, two in PAIRS if one in usable and two in usable]
    paired = {name for each in pairs for name in each}
    options: list[tuple[str, str | None]] = [*pairs, *((name, None) for name in TEXTS if name in {*usable} - paired)]
    if len(options) != 1:
        raise MoefyError(f"{no_column(table, 'text', columns)}: name the column of the texts (--text_column)")
    one, two = options[0][0], pair or options[0][1]
    and_pairs = f" and second texts column {two}" if two and two != pair else ""
    say(f"{table}: texts are column {one}{and_pairs} (--text_column)")
    return one, two


def usual_column(table: str, columns: Mapping[str, Any], role: str, usual: tuple[str, ...]) -> str | None:
    """Return a table's column of this name, or the only one with a usual name, which is said; None without one."""
    if role in columns:
        return role
    options = [name for name in usual if name in columns]
    if len(options) != 1:
        return None
    say(f"{table}: {role}s are column {options[0]} (--{role}_column)")
    return options[0]


def no_column(table: str, column: str, columns: Iterable[str]) -> str:
    """Return that a table has no such column, and which it has."""
    return f"{table} has no column {column}; it has {', '.join(columns) or 'none'}"
