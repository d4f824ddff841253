"""MoEfied Mistral."""

from transformers import (
    MistralForCausalLM,
    MistralForQuestionAnswering,
    MistralForSequenceClassification,
    MistralForTokenClassification,
    MistralModel,
)

from .moefied import MoefiedMixin


class MoefiedMistralModel(MoefiedMixin, MistralModel):
    _auto_class = "AutoModel"


class MoefiedMistralForCausalLM(MoefiedMixin, MistralForCausalLM):
    _auto_class = "AutoModelForCausalLM"


class MoefiedMistralForSequenceClassification(MoefiedMixin, MistralForSequenceClassification):
    _auto_class = "AutoModelForSequenceClassification"


class MoefiedMistralForTokenClassification(MoefiedMixin, MistralForTokenClassification):
    _auto_class = "AutoModelForTokenClassification"


class MoefiedMistralForQuestionAnswering(MoefiedMixin, MistralForQuestionAnswering):
    _auto_class = "AutoModelForQuestionAnswering"
