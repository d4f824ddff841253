"""MoEfied Gemma."""

from transformers import GemmaForCausalLM, GemmaForSequenceClassification, GemmaForTokenClassification, GemmaModel

from .moefied import MoefiedMixin


class MoefiedGemmaModel(MoefiedMixin, GemmaModel):
    _auto_class = "AutoModel"


class MoefiedGemmaForCausalLM(MoefiedMixin, GemmaForCausalLM):
    _auto_class = "AutoModelForCausalLM"


class MoefiedGemmaForSequenceClassification(MoefiedMixin, GemmaForSequenceClassification):
    _auto_class = "AutoModelForSequenceClassification"


class MoefiedGemmaForTokenClassification(MoefiedMixin, GemmaForTokenClassification):
    _auto_class = "AutoModelForTokenClassification"
