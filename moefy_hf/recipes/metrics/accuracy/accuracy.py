"""Accuracy as a module of the library `evaluate`: the share of predictions that equal their references."""

import datasets
import evaluate
import numpy as np

DESCRIPTION = "The share of predictions that equal their references."


class Accuracy(evaluate.Metric):
    """The share of predictions that equal their references."""

    def _info(self):
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation="",
            inputs_description="predictions and references: class numbers (N,)",
            features=datasets.Features(dict.fromkeys(("predictions", "references"), datasets.Value("int32"))),
        )

    def _compute(self, predictions, references):
        return {"accuracy": float(np.mean(np.asarray(predictions) == np.asarray(references)))}
