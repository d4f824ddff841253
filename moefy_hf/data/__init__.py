"""Texts and images out of files, standard input and datasets, as model-ready batches."""

from .batches import CutTexts, TextBatches, TokenBudget, decoder_start_of, longest_text, padding
from .images import ImageBatches, Images, ImageTable, pixels
from .tables import TextRows, TextSource, TextTable
from .texts import Row, Texts, split_off

__all__ = [
    "CutTexts",
    "ImageBatches",
    "ImageTable",
    "Images",
    "Row",
    "TextBatches",
    "TextRows",
    "TextSource",
    "TextTable",
    "Texts",
    "TokenBudget",
    "decoder_start_of",
    "longest_text",
    "padding",
    "pixels",
    "split_off",
]
