"""MoEfied Llama."""

from transformers import (
    LlamaForCausalLM,
    LlamaForQuestionAnswering,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
    LlamaModel,
)

from .moefied import MoefiedMixin


class MoefiedLlamaModel(MoefiedMixin, LlamaModel):
    _auto_class = "AutoModel"


class MoefiedLlamaForCausalLM(MoefiedMixin, LlamaForCausalLM):
    _auto_class = "AutoModelForCausalLM"


class MoefiedLlamaForSequenceClassification(MoefiedMixin, LlamaForSequenceClassification):
    _auto_class = "AutoModelForSequenceClassification"


class MoefiedLlamaForTokenClassification(MoefiedMixin, LlamaForTokenClassification):
    _auto_class = "AutoModelForTokenClassification"


class MoefiedLlamaForQuestionAnswering(MoefiedMixin, LlamaForQuestionAnswering):
    _auto_class = "AutoModelForQuestionAnswering"
