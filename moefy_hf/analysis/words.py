"""What kind of word a token is, from the vocabulary alone."""

import string

import torch
from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS
from transformers import PreTrainedTokenizerBase

KINDS = ("special", "punctuation", "number", "word piece", "stop word", "capitalised", "other word")
STARTS = ("\u2581", "\u0120")  # what SentencePiece and byte-level BPE write before a new word


def kind_of(piece: str, starts: bool) -> str:
    """Return which of `KINDS` a piece of a vocabulary is; `starts` says whether it begins a word."""
    if piece and all(not character.isalnum() for character in piece):
        return "punctuation"
    if any(character.isdigit() for character in piece):
        return "number"
    if not starts:
        return "word piece"
    if piece.lower() in ENGLISH_STOP_WORDS:
        return "stop word"
    return "capitalised" if piece[:1].isupper() else "other word"


def token_kinds(tokenizer: PreTrainedTokenizerBase, size: int) -> torch.Tensor:
    """Return for every token id its index in `KINDS`, (V,).

    Stop words are English ones; an uncased vocabulary has no capitals. In a text's first word the mark of a new word
    may be missing: it counts as a piece then.

    Args:
        size: V, of the model's vocabulary; what the tokenizer does not know is special.
    """
    known = min(size, len(tokenizer))
    pieces = [piece or "" for piece in tokenizer.convert_ids_to_tokens(list(range(known)))]
    marked = any(piece.startswith(STARTS) and len(piece) > 1 for piece in pieces)
    special = set(tokenizer.all_special_ids)
    kinds = torch.full((size,), KINDS.index("special"))
    for index, piece in enumerate(pieces):
        if index not in special:
            starts = piece.startswith(STARTS) if marked else not piece.startswith("##")
            kinds[index] = KINDS.index(kind_of(bare(piece), starts))
    return kinds


def bare(piece: str) -> str:
    """Return a token without the marks of its vocabulary."""
    if piece in string.punctuation:  # "#" itself
        return piece
    return piece.removeprefix("##").lstrip("".join(STARTS)).replace("\u010a", "\n")
