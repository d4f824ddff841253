"""MoEfied DeBERTa-v2 and -v3."""

from transformers import (
    DebertaV2ForMaskedLM,
    DebertaV2ForMultipleChoice,
    DebertaV2ForQuestionAnswering,
    DebertaV2ForSequenceClassification,
    DebertaV2ForTokenClassification,
    DebertaV2Model,
)

from .moefied import MoefiedMixin


class MoefiedDebertaV2Model(MoefiedMixin, DebertaV2Model):
    _auto_class = "AutoModel"


class MoefiedDebertaV2ForMaskedLM(MoefiedMixin, DebertaV2ForMaskedLM):
    _auto_class = "AutoModelForMaskedLM"


class MoefiedDebertaV2ForSequenceClassification(MoefiedMixin, DebertaV2ForSequenceClassification):
    _auto_class = "AutoModelForSequenceClassification"


class MoefiedDebertaV2ForTokenClassification(MoefiedMixin, DebertaV2ForTokenClassification):
    _auto_class = "AutoModelForTokenClassification"


class MoefiedDebertaV2ForQuestionAnswering(MoefiedMixin, DebertaV2ForQuestionAnswering):
    _auto_class = "AutoModelForQuestionAnswering"


class MoefiedDebertaV2ForMultipleChoice(MoefiedMixin, DebertaV2ForMultipleChoice):
    _auto_class = "AutoModelForMultipleChoice"
