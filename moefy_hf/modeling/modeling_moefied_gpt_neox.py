"""MoEfied GPT-NeoX and Pythia."""

from transformers import (
    GPTNeoXForCausalLM,
    GPTNeoXForQuestionAnswering,
    GPTNeoXForSequenceClassification,
    GPTNeoXForTokenClassification,
    GPTNeoXModel,
)

from .moefied import MoefiedMixin


class MoefiedGPTNeoXModel(MoefiedMixin, GPTNeoXModel):
    _auto_class = "AutoModel"


class MoefiedGPTNeoXForCausalLM(MoefiedMixin, GPTNeoXForCausalLM):
    _auto_class = "AutoModelForCausalLM"


class MoefiedGPTNeoXForSequenceClassification(MoefiedMixin, GPTNeoXForSequenceClassification):
    _auto_class = "AutoModelForSequenceClassification"


class MoefiedGPTNeoXForTokenClassification(MoefiedMixin, GPTNeoXForTokenClassification):
    _auto_class = "AutoModelForTokenClassification"


class MoefiedGPTNeoXForQuestionAnswering(MoefiedMixin, GPTNeoXForQuestionAnswering):
    _auto_class = "AutoModelForQuestionAnswering"
