"""MoEfied BERT."""

from transformers import (
    BertForMaskedLM,
    BertForMultipleChoice,
    BertForNextSentencePrediction,
    BertForPreTraining,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertLMHeadModel,
    BertModel,
)

from .moefied import MoefiedMixin


class MoefiedBertModel(MoefiedMixin, BertModel):
    _auto_class = "AutoModel"


class MoefiedBertLMHeadModel(MoefiedMixin, BertLMHeadModel):
    _auto_class = "AutoModelForCausalLM"


class MoefiedBertForMaskedLM(MoefiedMixin, BertForMaskedLM):
    _auto_class = "AutoModelForMaskedLM"


class MoefiedBertForSequenceClassification(MoefiedMixin, BertForSequenceClassification):
    _auto_class = "AutoModelForSequenceClassification"


class MoefiedBertForTokenClassification(MoefiedMixin, BertForTokenClassification):
    _auto_class = "AutoModelForTokenClassification"


class MoefiedBertForQuestionAnswering(MoefiedMixin, BertForQuestionAnswering):
    _auto_class = "AutoModelForQuestionAnswering"


class MoefiedBertForMultipleChoice(MoefiedMixin, BertForMultipleChoice):
    _auto_class = "AutoModelForMultipleChoice"


class MoefiedBertForPreTraining(MoefiedMixin, BertForPreTraining):
    _auto_class = "AutoModelForPreTraining"


class MoefiedBertForNextSentencePrediction(MoefiedMixin, BertForNextSentencePrediction):
    _auto_class = "AutoModelForNextSentencePrediction"
