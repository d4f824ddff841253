"""MoEfied ModernBERT."""

from transformers import (
    ModernBertForMaskedLM,
    ModernBertForMultipleChoice,
    ModernBertForQuestionAnswering,
    ModernBertForSequenceClassification,
    ModernBertForTokenClassification,
    ModernBertModel,
)

from .moefied import MoefiedMixin


class MoefiedModernBertModel(MoefiedMixin, ModernBertModel):
    _auto_class = "AutoModel"


class MoefiedModernBertForMaskedLM(MoefiedMixin, ModernBertForMaskedLM):
    _auto_class = "AutoModelForMaskedLM"


class MoefiedModernBertForSequenceClassification(MoefiedMixin, ModernBertForSequenceClassification):
    _auto_class = "AutoModelForSequenceClassification"


class MoefiedModernBertForTokenClassification(MoefiedMixin, ModernBertForTokenClassification):
    _auto_class = "AutoModelForTokenClassification"


class MoefiedModernBertForQuestionAnswering(MoefiedMixin, ModernBertForQuestionAnswering):
    _auto_class = "AutoModelForQuestionAnswering"


class MoefiedModernBertForMultipleChoice(MoefiedMixin, ModernBertForMultipleChoice):
    _auto_class = "AutoModelForMultipleChoice"
