"""MoEfied StarCoder2."""

from transformers import (
    Starcoder2ForCausalLM,
    Starcoder2ForSequenceClassification,
    Starcoder2ForTokenClassification,
    Starcoder2Model,
)

from .moefied import MoefiedMixin


class MoefiedStarcoder2Model(MoefiedMixin, Starcoder2Model):
    _auto_class = "AutoModel"


class MoefiedStarcoder2ForCausalLM(MoefiedMixin, Starcoder2ForCausalLM):
    _auto_class = "AutoModelForCausalLM"


class MoefiedStarcoder2ForSequenceClassification(MoefiedMixin, Starcoder2ForSequenceClassification):
    _auto_class = "AutoModelForSequenceClassification"


class MoefiedStarcoder2ForTokenClassification(MoefiedMixin, Starcoder2ForTokenClassification):
    _auto_class = "AutoModelForTokenClassification"
