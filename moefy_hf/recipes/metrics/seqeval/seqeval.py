"""Tags of words as a module of the library `evaluate`: accuracy, and entities as the package seqeval counts them."""

import importlib

import datasets
import evaluate

DESCRIPTION = "Accuracy of tags; with tags like B-PER also precision, recall and F1 of whole entities."
NEEDED = "entities are counted by the package seqeval: pip install 'moefy-hf[tokens]'"


class Seqeval(evaluate.Metric):
    """Accuracy of tags; with tags like B-PER also precision, recall and F1 of whole entities."""

    def _info(self):
        tags = datasets.Sequence(datasets.Value("string"))
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation="",
            inputs_description="predictions and references: a list of tags for each text",
            features=datasets.Features(dict.fromkeys(("predictions", "references"), tags)),
        )

    def _compute(self, predictions, references):
        pairs = [pair for texts in zip(predictions, references, strict=True) for pair in zip(*texts, strict=True)]
        scores = {"accuracy": sum(found == right for found, right in pairs) / max(len(pairs), 1)}
        if any(right.startswith(("B-", "I-")) for _, right in pairs):
            try:
                metrics = importlib.import_module("seqeval.metrics")
            except ImportError:
                raise ValueError(NEEDED) from None
            for name in ("precision", "recall", "f1"):
                score = vars(metrics)[f"{name}_score"]
                scores[name] = float(score(references, predictions, zero_division=0))
        return scores
