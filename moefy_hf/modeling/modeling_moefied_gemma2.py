"""MoEfied Gemma 2."""

from transformers import Gemma2ForCausalLM, Gemma2ForSequenceClassification, Gemma2ForTokenClassification, Gemma2Model

from .moefied import MoefiedMixin


class MoefiedGemma2Model(MoefiedMixin, Gemma2Model):
    _auto_class = "AutoModel"


class MoefiedGemma2ForCausalLM(MoefiedMixin, Gemma2ForCausalLM):
    _auto_class = "AutoModelForCausalLM"


class MoefiedGemma2ForSequenceClassification(MoefiedMixin, Gemma2ForSequenceClassification):
    _auto_class = "AutoModelForSequenceClassification"


class MoefiedGemma2ForTokenClassification(MoefiedMixin, Gemma2ForTokenClassification):
    _auto_class = "AutoModelForTokenClassification"
