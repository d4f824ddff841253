"""Kinds of words, from vocabularies of three conventions."""

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from moefy_hf.analysis.words import KINDS, bare, token_kinds


def kinds(vocabulary: list[str], **special) -> list[str]:
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token=vocabulary[0]))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token=vocabulary[0], **special)
    return [KINDS[kind] for kind in token_kinds(fast, len(vocabulary) + 1).tolist()]


def test_wordpiece():
    found = kinds(
        ["[UNK]", "[CLS]", "oil", "##ing", "the", "##the", "1987", "##7", ".", "#", "Paris"], cls_token="[CLS]"
    )
    assert found == [
        *("special", "special", "other word", "word piece", "stop word", "word piece", "number", "number"),
        *("punctuation", "punctuation", "capitalised", "special"),  # the last one is beyond the vocabulary
    ]


@pytest.mark.parametrize("start", ["\u2581", "\u0120"])
def test_marked_starts(start):
    found = kinds(["<unk>", f"{start}oil", "ing", f"{start}The", f"{start}Paris", f"{start}12", ",", f"{start}("])
    assert found[1:8] == [
        *("other word", "word piece", "stop word", "capitalised", "number", "punctuation", "punctuation")
    ]


def test_tokens_are_shown_without_marks():
    assert [bare(each) for each in ("##ing", "\u0120oil", "\u2581oil", "#", "a#b")] == [
        "ing",
        "oil",
        "oil",
        "#",
        "a#b",
    ]
