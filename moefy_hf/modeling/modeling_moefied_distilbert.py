"""MoEfied DistilBERT."""

from transformers import (
    DistilBertForMaskedLM,
    DistilBertForMultipleChoice,
    DistilBertForQuestionAnswering,
    DistilBertForSequenceClassification,
    DistilBertForTokenClassification,
    DistilBertModel,
)

from .moefied import MoefiedMixin


class MoefiedDistilBertModel(MoefiedMixin, DistilBertModel):
    _auto_class = "AutoModel"


class MoefiedDistilBertForMaskedLM(MoefiedMixin, DistilBertForMaskedLM):
    _auto_class = "AutoModelForMaskedLM"


class MoefiedDistilBertForSequenceClassification(MoefiedMixin, DistilBertForSequenceClassification):
    _auto_class = "AutoModelForSequenceClassification"


class MoefiedDistilBertForTokenClassification(MoefiedMixin, DistilBertForTokenClassification):
    _auto_class = "AutoModelForTokenClassification"


class MoefiedDistilBertForQuestionAnswering(MoefiedMixin, DistilBertForQuestionAnswering):
    _auto_class = "AutoModelForQuestionAnswering"


class MoefiedDistilBertForMultipleChoice(MoefiedMixin, DistilBertForMultipleChoice):
    _auto_class = "AutoModelForMultipleChoice"
