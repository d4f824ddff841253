"""MoEfied XLM-RoBERTa."""

from transformers import (
    XLMRobertaForCausalLM,
    XLMRobertaForMaskedLM,
    XLMRobertaForMultipleChoice,
    XLMRobertaForQuestionAnswering,
    XLMRobertaForSequenceClassification,
    XLMRobertaForTokenClassification,
    XLMRobertaModel,
)

from .moefied import MoefiedMixin


class MoefiedXLMRobertaModel(MoefiedMixin, XLMRobertaModel):
    _auto_class = "AutoModel"


class MoefiedXLMRobertaForCausalLM(MoefiedMixin, XLMRobertaForCausalLM):
    _auto_class = "AutoModelForCausalLM"


class MoefiedXLMRobertaForMaskedLM(MoefiedMixin, XLMRobertaForMaskedLM):
    _auto_class = "AutoModelForMaskedLM"


class MoefiedXLMRobertaForSequenceClassification(MoefiedMixin, XLMRobertaForSequenceClassification):
    _auto_class = "AutoModelForSequenceClassification"


class MoefiedXLMRobertaForTokenClassification(MoefiedMixin, XLMRobertaForTokenClassification):
    _auto_class = "AutoModelForTokenClassification"


class MoefiedXLMRobertaForQuestionAnswering(MoefiedMixin, XLMRobertaForQuestionAnswering):
    _auto_class = "AutoModelForQuestionAnswering"


class MoefiedXLMRobertaForMultipleChoice(MoefiedMixin, XLMRobertaForMultipleChoice):
    _auto_class = "AutoModelForMultipleChoice"
