"""MoEfied mBART."""

from transformers import (
    MBartForCausalLM,
    MBartForConditionalGeneration,
    MBartForQuestionAnswering,
    MBartForSequenceClassification,
    MBartModel,
)

from .moefied import MoefiedMixin


class MoefiedMBartModel(MoefiedMixin, MBartModel):
    _auto_class = "AutoModel"


class MoefiedMBartForCausalLM(MoefiedMixin, MBartForCausalLM):
    _auto_class = "AutoModelForCausalLM"


class MoefiedMBartForConditionalGeneration(MoefiedMixin, MBartForConditionalGeneration):
    _auto_class = "AutoModelForSeq2SeqLM"


class MoefiedMBartForSequenceClassification(MoefiedMixin, MBartForSequenceClassification):
    _auto_class = "AutoModelForSequenceClassification"


class MoefiedMBartForQuestionAnswering(MoefiedMixin, MBartForQuestionAnswering):
    _auto_class = "AutoModelForQuestionAnswering"
