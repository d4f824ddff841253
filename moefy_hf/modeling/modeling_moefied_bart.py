"""MoEfied BART."""

from transformers import (
    BartForCausalLM,
    BartForConditionalGeneration,
    BartForQuestionAnswering,
    BartForSequenceClassification,
    BartModel,
)

from .moefied import MoefiedMixin


class MoefiedBartModel(MoefiedMixin, BartModel):
    _auto_class = "AutoModel"


class MoefiedBartForCausalLM(MoefiedMixin, BartForCausalLM):
    _auto_class = "AutoModelForCausalLM"


class MoefiedBartForConditionalGeneration(MoefiedMixin, BartForConditionalGeneration):
    _auto_class = "AutoModelForSeq2SeqLM"


class MoefiedBartForSequenceClassification(MoefiedMixin, BartForSequenceClassification):
    _auto_class = "AutoModelForSequenceClassification"


class MoefiedBartForQuestionAnswering(MoefiedMixin, BartForQuestionAnswering):
    _auto_class = "AutoModelForQuestionAnswering"
