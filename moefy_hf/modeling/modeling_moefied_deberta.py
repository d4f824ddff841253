"""MoEfied DeBERTa."""

from transformers import (
    DebertaForMaskedLM,
    DebertaForQuestionAnswering,
    DebertaForSequenceClassification,
    DebertaForTokenClassification,
    DebertaModel,
)

from .moefied import MoefiedMixin


class MoefiedDebertaModel(MoefiedMixin, DebertaModel):
    _auto_class = "AutoModel"


class MoefiedDebertaForMaskedLM(MoefiedMixin, DebertaForMaskedLM):
    _auto_class = "AutoModelForMaskedLM"


class MoefiedDebertaForSequenceClassification(MoefiedMixin, DebertaForSequenceClassification):
    _auto_class = "AutoModelForSequenceClassification"


class MoefiedDebertaForTokenClassification(MoefiedMixin, DebertaForTokenClassification):
    _auto_class = "AutoModelForTokenClassification"


class MoefiedDebertaForQuestionAnswering(MoefiedMixin, DebertaForQuestionAnswering):
    _auto_class = "AutoModelForQuestionAnswering"
