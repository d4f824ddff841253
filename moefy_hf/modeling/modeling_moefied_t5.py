"""MoEfied T5."""

from transformers import (
    T5EncoderModel,
    T5ForConditionalGeneration,
    T5ForQuestionAnswering,
    T5ForSequenceClassification,
    T5ForTokenClassification,
    T5Model,
)

from .moefied import MoefiedMixin


class MoefiedT5Model(MoefiedMixin, T5Model):
    _auto_class = "AutoModel"


class MoefiedT5EncoderModel(MoefiedMixin, T5EncoderModel):
    _auto_class = "AutoModelForTextEncoding"


class MoefiedT5ForConditionalGeneration(MoefiedMixin, T5ForConditionalGeneration):
    _auto_class = "AutoModelForSeq2SeqLM"


class MoefiedT5ForSequenceClassification(MoefiedMixin, T5ForSequenceClassification):
    _auto_class = "AutoModelForSequenceClassification"


class MoefiedT5ForTokenClassification(MoefiedMixin, T5ForTokenClassification):
    _auto_class = "AutoModelForTokenClassification"


class MoefiedT5ForQuestionAnswering(MoefiedMixin, T5ForQuestionAnswering):
    _auto_class = "AutoModelForQuestionAnswering"
