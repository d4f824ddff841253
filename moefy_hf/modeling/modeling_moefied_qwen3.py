"""MoEfied Qwen3."""

from transformers import (
    Qwen3ForCausalLM,
    Qwen3ForQuestionAnswering,
    Qwen3ForSequenceClassification,
    Qwen3ForTokenClassification,
    Qwen3Model,
)

from .moefied import MoefiedMixin


class MoefiedQwen3Model(MoefiedMixin, Qwen3Model):
    _auto_class = "AutoModel"


class MoefiedQwen3ForCausalLM(MoefiedMixin, Qwen3ForCausalLM):
    _auto_class = "AutoModelForCausalLM"


class MoefiedQwen3ForSequenceClassification(MoefiedMixin, Qwen3ForSequenceClassification):
    _auto_class = "AutoModelForSequenceClassification"


class MoefiedQwen3ForTokenClassification(MoefiedMixin, Qwen3ForTokenClassification):
    _auto_class = "AutoModelForTokenClassification"


class MoefiedQwen3ForQuestionAnswering(MoefiedMixin, Qwen3ForQuestionAnswering):
    _auto_class = "AutoModelForQuestionAnswering"
