"""MoEfied OPT."""

from transformers import OPTForCausalLM, OPTForQuestionAnswering, OPTForSequenceClassification, OPTModel

from .moefied import MoefiedMixin


class MoefiedOPTModel(MoefiedMixin, OPTModel):
    _auto_class = "AutoModel"


class MoefiedOPTForCausalLM(MoefiedMixin, OPTForCausalLM):
    _auto_class = "AutoModelForCausalLM"


class MoefiedOPTForSequenceClassification(MoefiedMixin, OPTForSequenceClassification):
    _auto_class = "AutoModelForSequenceClassification"


class MoefiedOPTForQuestionAnswering(MoefiedMixin, OPTForQuestionAnswering):
    _auto_class = "AutoModelForQuestionAnswering"
