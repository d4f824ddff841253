"""Where texts come from, and their rows, one after the other."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from transformers import PreTrainedModel

from ..arguments import about, positive, switch
from ..errors import MoefyError
from .classes import Classes
from .columns import LABELS, TARGETS, is_text, no_column, text_columns, usual_column
from .opening import STANDARD_INPUT, open_dataset, said_plainly
from .texts import Row, Texts, say

WINDOW = 256  # rows that are read at a time


class Enough(Protocol):
    """Says when rows are enough, as `TokenBudget` does."""

    def spent(self, rows: Sequence[Row]) -> bool: ...


@dataclass(frozen=True)
class TextSource:
    """Where texts come from, and how they are read; the same for Python and the command line.

    Args:
        path: a csv, tsv, json lines or parquet file, or plain text with a text per line; a folder that holds one kind
            of these; "-", standard input; or a dataset of the Hub: NAME, NAME/CONFIG, OWNER/NAME or OWNER/NAME/CONFIG.
            :SPLIT behind a folder or dataset says which part. A file or folder wins over a name on the Hub.
        text_column: of the texts; by default "text" or, where there is none, the only one with a usual name.
        pair_column: of second texts, which are tokenised together with the first.
        label_column: of classes: names or ids that the model has; by default "label".
        target_column: of what an encoder-decoder is to write; by default "target", or the only usual one.
        max_rows: texts, at most; all by default.
        streaming: read only the first rows, as many as are needed, and download no more of a dataset.

    Raises:
        MoefyError: `max_rows` is not positive.

    Example:
        >>> texts = TextSource("reviews.parquet", text_column="review").open().read(model, labels=True)
    """

    path: str
    text_column: str | None = field(
        default=None, metadata=about("of the texts; by default text, or the only usual one", str, metavar="COLUMN")
    )
    pair_column: str | None = field(
        default=None, metadata=about("of second texts, read together with the first", str, metavar="COLUMN")
    )
    label_column: str | None = field(
        default=None, metadata=about("of classes, names or ids; by default label", str, metavar="COLUMN")
    )
    target_column: str | None = field(
        default=None,
        metadata=about(
            "of what an encoder-decoder is to write; by default target, or the only usual one", str, metavar="COLUMN"
        ),
    )
    max_rows: int | None = field(default=None, metadata=about("texts, at most; all by default", positive))
    streaming: bool = field(
        default=False,
        metadata=about("read only the first rows, as many as are needed; download no more of a dataset", switch),
    )

    def __post_init__(self) -> None:
        if self.max_rows is not None and self.max_rows < 1:
            raise MoefyError(f"max_rows must be positive, got {self.max_rows}")

    @property
    def name(self) -> str:
        """Return what figures call it."""
        if self.path == STANDARD_INPUT:
            return "standard input"
        return Path(self.path).name if Path(self.path).exists() else self.path

    def check_bounded(self) -> None:
        """Check that not all rows of a stream are wanted.

        Raises:
            MoefyError: they are.
        """
        if self.streaming and self.max_rows is None:
            raise MoefyError("with --streaming only some rows are read, and here all are needed: give --max_rows")

    def open(self) -> "TextTable":
        """Find the texts, and see which columns there are.

        Raises:
            MoefyError: there are none, they cannot be read, or a column is missing.
        """
        return TextTable(self)


class TextTable:
    """Texts that are there, and have not been read yet.

    Args:
        source: where they are.

    Raises:
        MoefyError: there is nothing of this name, it cannot be read, or it has not the columns.
    """

    def __init__(self, source: TextSource):
        self.source, self.path = source, source.path
        self.opened = open_dataset(source.path, source.streaming)
        columns, others = self.opened.columns, (source.label_column, source.target_column)
        for column in (source.text_column, source.pair_column, *others):
            if column is not None and column not in columns:
                raise MoefyError(no_column(self.path, column, columns))
        self.text, self.pair = text_columns(self.path, columns, source.text_column, source.pair_column, others)

    def lacking(self, role: str) -> str:
        """Return that there is no column with this role, and which columns there are."""
        return f"{no_column(self.path, role, self.opened.columns)} (--{role}_column names another)"

    def rows(self, model: PreTrainedModel, *, labels: bool = False, bounded: bool = False) -> "TextRows":
        """Return the rows as a model reads them, which can be read any number of times.

        Args:
            model: that reads them; an encoder-decoder takes targets, where there are any.
            labels: whether a classifier's class ids are wanted, where there are any.
            bounded: whether the caller stops by itself.

        Raises:
            MoefyError: all rows of a stream are needed, or the model has no use for a column that was named.
        """
        source, columns, label, target = self.source, self.opened.columns, None, None
        if not bounded:
            source.check_bounded()
        writes = model.config.is_encoder_decoder and model.can_generate()
        classifies = model._get_name().endswith("SequenceClassification")
        if source.target_column and not writes or labels and source.label_column and not classifies:
            wrong = "--target_column" if source.target_column and not writes else "--label_column"
            raise MoefyError(f"a {model._get_name()} has no use for {wrong}: leave it out")
        if writes:
            usual = {name: feature for name, feature in columns.items() if is_text(feature)}
            usual = {name: feature for name, feature in usual.items() if name not in (self.text, self.pair)}
            target = source.target_column or usual_column(self.path, usual, "target", TARGETS)
        elif labels and classifies:
            label = source.label_column or usual_column(self.path, columns, "label", LABELS)
            if label is None and self.opened.table:
                say(f"{self.lacking('label')}: classes are not known")
        return TextRows(self, model, label, target)

    def read(
        self, model: PreTrainedModel, *, labels: bool = False, most: int | None = None, enough: Enough | None = None
    ) -> Texts:
        """Read the texts.

        Args:
            model, labels: as `rows` has them.
            most: texts, at most.
            enough: where only some rows are read (`streaming`): says when to stop.

        Raises:
            MoefyError: there are none, a row has no label or one that the model does not have, or all rows of a
                stream are needed.
        """
        rows = iter(self.rows(model, labels=labels, bounded=most is not None or enough is not None))
        found: list[Row] = []
        while window := list(islice(rows, WINDOW if most is None else min(WINDOW, most - len(found)))):
            found += window
            if self.source.streaming and enough is not None and enough.spent(window):
                break
        if not found:
            raise MoefyError(f"{self.path} holds no text")
        return Texts.of(found)


class TextRows:
    """The rows of a table, as `TextTable.rows` returns them. Empty texts are left out; how many is said once.

    Attributes:
        labelled: whether rows have class ids.
        path, name: what errors and what figures call the table.
    """

    def __init__(self, table: TextTable, model: PreTrainedModel, label: str | None, target: str | None):
        self.table, self.path, self.label, self.target = table, table.path, label, target
        self.labelled, self.name = label is not None, table.source.name
        self.said = False
        self.classes = Classes(model.config, self.path, table.opened.columns, label) if label else None

    def __iter__(self) -> Iterator[Row]:
        most, kept, empty = self.table.source.max_rows, 0, 0
        try:
            for number, cells in enumerate(self.cells(), start=1):
                row = self.row(number, cells)
                if not row.text or row.target == "":
                    empty += 1
                    continue
                kept += 1
                yield row
                if kept == most:
                    return
        finally:
            if empty and not self.said:
                self.said = True
                say(f"{empty} of {kept + empty} rows of {self.path} have no text: they are left out")

    def cells(self) -> Iterator[tuple[Any, ...]]:
        """Yield what stands in the columns of each row."""
        columns = (self.table.text, self.table.pair, self.label, self.target)
        named = list(dict.fromkeys(column for column in columns if column))
        size = min(WINDOW, self.table.source.max_rows or WINDOW)
        with said_plainly(self.path):
            for part in self.table.opened.dataset.select_columns(named).with_format("arrow").iter(batch_size=size):
                values = part.to_pydict()
                missing = [None] * len(part)
                yield from zip(*(values[column] if column else missing for column in columns), strict=True)

    def row(self, number: int, cells: tuple[Any, ...]) -> Row:
        """Return the row of this number, from 1.

        Raises:
            MoefyError: it has no label, or one that the model does not have, or what should be text is none.
        """
        text, pair, label, target = cells
        named = ((self.table.text, text), (self.table.pair, pair), (self.target, target))
        texts = [column and self.stripped(number, column, cell) for column, cell in named]
        if not texts[0]:
            return Row("")
        class_id = self.classes.of(number, label) if self.classes else None
        return Row(texts[0], texts[1], class_id, texts[2])

    def stripped(self, number: int, column: str, cell: Any) -> str:
        """Return a cell's text, empty where there is none.

        Raises:
            MoefyError: it is no text.
        """
        if not isinstance(cell, str | None):
            raise MoefyError(f"{self.path}: row {number} of column {column} is no text but {cell!r:.60}")
        return (cell or "").strip()
