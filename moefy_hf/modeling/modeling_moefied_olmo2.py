"""MoEfied OLMo 2."""

from transformers import Olmo2ForCausalLM, Olmo2ForSequenceClassification, Olmo2Model

from .moefied import MoefiedMixin


class MoefiedOlmo2Model(MoefiedMixin, Olmo2Model):
    _auto_class = "AutoModel"


class MoefiedOlmo2ForCausalLM(MoefiedMixin, Olmo2ForCausalLM):
    _auto_class = "AutoModelForCausalLM"


class MoefiedOlmo2ForSequenceClassification(MoefiedMixin, Olmo2ForSequenceClassification):
    _auto_class = "AutoModelForSequenceClassification"
