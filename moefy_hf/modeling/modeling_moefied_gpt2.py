"""MoEfied GPT-2."""

from transformers import (
    GPT2ForQuestionAnswering,
    GPT2ForSequenceClassification,
    GPT2ForTokenClassification,
    GPT2LMHeadModel,
    GPT2Model,
)

from .moefied import MoefiedMixin


class MoefiedGPT2Model(MoefiedMixin, GPT2Model):
    _auto_class = "AutoModel"


class MoefiedGPT2LMHeadModel(MoefiedMixin, GPT2LMHeadModel):
    _auto_class = "AutoModelForCausalLM"


class MoefiedGPT2ForSequenceClassification(MoefiedMixin, GPT2ForSequenceClassification):
    _auto_class = "AutoModelForSequenceClassification"


class MoefiedGPT2ForTokenClassification(MoefiedMixin, GPT2ForTokenClassification):
    _auto_class = "AutoModelForTokenClassification"


class MoefiedGPT2ForQuestionAnswering(MoefiedMixin, GPT2ForQuestionAnswering):
    _auto_class = "AutoModelForQuestionAnswering"
