"""MoEfied Gemma 3 (text)."""

from transformers import Gemma3ForCausalLM, Gemma3TextForSequenceClassification, Gemma3TextModel

from .moefied import MoefiedMixin


class MoefiedGemma3TextModel(MoefiedMixin, Gemma3TextModel):
    _auto_class = "AutoModel"


class MoefiedGemma3ForCausalLM(MoefiedMixin, Gemma3ForCausalLM):
    _auto_class = "AutoModelForCausalLM"


class MoefiedGemma3TextForSequenceClassification(MoefiedMixin, Gemma3TextForSequenceClassification):
    _auto_class = "AutoModelForSequenceClassification"
