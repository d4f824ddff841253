"""Exact match as a module of the library `evaluate`: the share of texts that equal their references."""

import datasets
import evaluate
import numpy as np

DESCRIPTION = "The share of texts that equal their references."


class ExactMatch(evaluate.Metric):
    """The share of texts that equal their references."""

    def _info(self):
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation="",
            inputs_description="predictions and references: texts",
            features=datasets.Features(dict.fromkeys(("predictions", "references"), datasets.Value("string"))),
        )

    def _compute(self, predictions, references):
        pairs = zip(predictions, references, strict=True)
        return {"exact_match": float(np.mean([text == expected for text, expected in pairs]))}
