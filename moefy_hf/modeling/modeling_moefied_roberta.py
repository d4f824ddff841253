"""MoEfied RoBERTa."""

from transformers import (
    RobertaForCausalLM,
    RobertaForMaskedLM,
    RobertaForMultipleChoice,
    RobertaForQuestionAnswering,
    RobertaForSequenceClassification,
    RobertaForTokenClassification,
    RobertaModel,
)

from .moefied import MoefiedMixin


class MoefiedRobertaModel(MoefiedMixin, RobertaModel):
    _auto_class = "AutoModel"


class MoefiedRobertaForCausalLM(MoefiedMixin, RobertaForCausalLM):
    _auto_class = "AutoModelForCausalLM"


class MoefiedRobertaForMaskedLM(MoefiedMixin, RobertaForMaskedLM):
    _auto_class = "AutoModelForMaskedLM"


class MoefiedRobertaForSequenceClassification(MoefiedMixin, RobertaForSequenceClassification):
    _auto_class = "AutoModelForSequenceClassification"


class MoefiedRobertaForTokenClassification(MoefiedMixin, RobertaForTokenClassification):
    _auto_class = "AutoModelForTokenClassification"


class MoefiedRobertaForQuestionAnswering(MoefiedMixin, RobertaForQuestionAnswering):
    _auto_class = "AutoModelForQuestionAnswering"


class MoefiedRobertaForMultipleChoice(MoefiedMixin, RobertaForMultipleChoice):
    _auto_class = "AutoModelForMultipleChoice"
