"""MoEfied GPT-Neo."""

from transformers import (
    GPTNeoForCausalLM,
    GPTNeoForQuestionAnswering,
    GPTNeoForSequenceClassification,
    GPTNeoForTokenClassification,
    GPTNeoModel,
)

from .moefied import MoefiedMixin


class MoefiedGPTNeoModel(MoefiedMixin, GPTNeoModel):
    _auto_class = "AutoModel"


class MoefiedGPTNeoForCausalLM(MoefiedMixin, GPTNeoForCausalLM):
    _auto_class = "AutoModelForCausalLM"


class MoefiedGPTNeoForSequenceClassification(MoefiedMixin, GPTNeoForSequenceClassification):
    _auto_class = "AutoModelForSequenceClassification"


class MoefiedGPTNeoForTokenClassification(MoefiedMixin, GPTNeoForTokenClassification):
    _auto_class = "AutoModelForTokenClassification"


class MoefiedGPTNeoForQuestionAnswering(MoefiedMixin, GPTNeoForQuestionAnswering):
    _auto_class = "AutoModelForQuestionAnswering"
