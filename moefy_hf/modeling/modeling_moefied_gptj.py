"""MoEfied GPT-J."""

from transformers import GPTJForCausalLM, GPTJForQuestionAnswering, GPTJForSequenceClassification, GPTJModel

from .moefied import MoefiedMixin


class MoefiedGPTJModel(MoefiedMixin, GPTJModel):
    _auto_class = "AutoModel"


class MoefiedGPTJForCausalLM(MoefiedMixin, GPTJForCausalLM):
    _auto_class = "AutoModelForCausalLM"


class MoefiedGPTJForSequenceClassification(MoefiedMixin, GPTJForSequenceClassification):
    _auto_class = "AutoModelForSequenceClassification"


class MoefiedGPTJForQuestionAnswering(MoefiedMixin, GPTJForQuestionAnswering):
    _auto_class = "AutoModelForQuestionAnswering"
