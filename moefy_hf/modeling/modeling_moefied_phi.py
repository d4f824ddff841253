"""MoEfied Phi."""

from transformers import PhiForCausalLM, PhiForSequenceClassification, PhiForTokenClassification, PhiModel

from .moefied import MoefiedMixin


class MoefiedPhiModel(MoefiedMixin, PhiModel):
    _auto_class = "AutoModel"


class MoefiedPhiForCausalLM(MoefiedMixin, PhiForCausalLM):
    _auto_class = "AutoModelForCausalLM"


class MoefiedPhiForSequenceClassification(MoefiedMixin, PhiForSequenceClassification):
    _auto_class = "AutoModelForSequenceClassification"


class MoefiedPhiForTokenClassification(MoefiedMixin, PhiForTokenClassification):
    _auto_class = "AutoModelForTokenClassification"
