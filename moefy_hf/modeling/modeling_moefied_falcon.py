"""MoEfied Falcon."""

from transformers import (
    FalconForCausalLM,
    FalconForQuestionAnswering,
    FalconForSequenceClassification,
    FalconForTokenClassification,
    FalconModel,
)

from .moefied import MoefiedMixin


class MoefiedFalconModel(MoefiedMixin, FalconModel):
    _auto_class = "AutoModel"


class MoefiedFalconForCausalLM(MoefiedMixin, FalconForCausalLM):
    _auto_class = "AutoModelForCausalLM"


class MoefiedFalconForSequenceClassification(MoefiedMixin, FalconForSequenceClassification):
    _auto_class = "AutoModelForSequenceClassification"


class MoefiedFalconForTokenClassification(MoefiedMixin, FalconForTokenClassification):
    _auto_class = "AutoModelForTokenClassification"


class MoefiedFalconForQuestionAnswering(MoefiedMixin, FalconForQuestionAnswering):
    _auto_class = "AutoModelForQuestionAnswering"
