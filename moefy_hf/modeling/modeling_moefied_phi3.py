"""MoEfied Phi-3."""

from transformers import Phi3ForCausalLM, Phi3ForSequenceClassification, Phi3ForTokenClassification, Phi3Model

from .moefied import MoefiedMixin


class MoefiedPhi3Model(MoefiedMixin, Phi3Model):
    _auto_class = "AutoModel"


class MoefiedPhi3ForCausalLM(MoefiedMixin, Phi3ForCausalLM):
    _auto_class = "AutoModelForCausalLM"


class MoefiedPhi3ForSequenceClassification(MoefiedMixin, Phi3ForSequenceClassification):
    _auto_class = "AutoModelForSequenceClassification"


class MoefiedPhi3ForTokenClassification(MoefiedMixin, Phi3ForTokenClassification):
    _auto_class = "AutoModelForTokenClassification"
