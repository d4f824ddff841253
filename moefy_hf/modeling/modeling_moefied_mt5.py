"""MoEfied mT5."""

from transformers import (
    MT5EncoderModel,
    MT5ForConditionalGeneration,
    MT5ForQuestionAnswering,
    MT5ForSequenceClassification,
    MT5ForTokenClassification,
    MT5Model,
)

from .moefied import MoefiedMixin


class MoefiedMT5Model(MoefiedMixin, MT5Model):
    _auto_class = "AutoModel"


class MoefiedMT5EncoderModel(MoefiedMixin, MT5EncoderModel):
    _auto_class = "AutoModelForTextEncoding"


class MoefiedMT5ForConditionalGeneration(MoefiedMixin, MT5ForConditionalGeneration):
    _auto_class = "AutoModelForSeq2SeqLM"


class MoefiedMT5ForSequenceClassification(MoefiedMixin, MT5ForSequenceClassification):
    _auto_class = "AutoModelForSequenceClassification"


class MoefiedMT5ForTokenClassification(MoefiedMixin, MT5ForTokenClassification):
    _auto_class = "AutoModelForTokenClassification"


class MoefiedMT5ForQuestionAnswering(MoefiedMixin, MT5ForQuestionAnswering):
    _auto_class = "AutoModelForQuestionAnswering"
