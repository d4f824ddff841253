"""Answers to questions as a module of the library `evaluate`: exact match and F1 of SQuAD, as shares.

Both compare words without case, punctuation and articles (Rajpurkar et al., 2016, section 6.1). An unanswerable
question is answered right by an empty text (Rajpurkar et al., 2018).
"""

import re
import string
from collections import Counter

import datasets
import evaluate

DESCRIPTION = "Exact match and F1 of answers, as SQuAD's, as shares."


def words(text: str) -> list[str]:
    """Return the words of an answer that count."""
    text = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def f1(found: list[str], right: list[str]) -> float:
    """Return the harmonic mean of precision and recall of words."""
    if not found or not right:
        return float(found == right)
    common = sum((Counter(found) & Counter(right)).values())
    return 2 * common / (len(found) + len(right))


class Squad(evaluate.Metric):
    """Exact match and F1 of answers, as SQuAD's, as shares."""

    def _info(self):
        text = datasets.Value("string")
        answers = {"text": datasets.Sequence(text), "answer_start": datasets.Sequence(datasets.Value("int32"))}
        features = {
            "predictions": {"id": text, "prediction_text": text},
            "references": {"id": text, "answers": answers},
        }
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation="",
            inputs_description="predictions: {id, prediction_text}; references: {id, answers: {text, answer_start}}",
            features=datasets.Features(features),
        )

    def _compute(self, predictions, references):
        found = {each["id"]: words(each["prediction_text"]) for each in predictions}
        exact = overlap = 0.0
        for each in references:
            right = [words(text) for text in each["answers"]["text"]] or [[]]
            exact += max(found[each["id"]] == answer for answer in right)
            overlap += max(f1(found[each["id"]], answer) for answer in right)
        return {"exact_match": exact / len(references), "f1": overlap / len(references)}
