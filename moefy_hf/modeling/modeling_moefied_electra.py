"""MoEfied ELECTRA."""

from transformers import (
    ElectraForCausalLM,
    ElectraForMaskedLM,
    ElectraForMultipleChoice,
    ElectraForPreTraining,
    ElectraForQuestionAnswering,
    ElectraForSequenceClassification,
    ElectraForTokenClassification,
    ElectraModel,
)

from .moefied import MoefiedMixin


class MoefiedElectraModel(MoefiedMixin, ElectraModel):
    _auto_class = "AutoModel"


class MoefiedElectraForCausalLM(MoefiedMixin, ElectraForCausalLM):
    _auto_class = "AutoModelForCausalLM"


class MoefiedElectraForMaskedLM(MoefiedMixin, ElectraForMaskedLM):
    _auto_class = "AutoModelForMaskedLM"


class MoefiedElectraForSequenceClassification(MoefiedMixin, ElectraForSequenceClassification):
    _auto_class = "AutoModelForSequenceClassification"


class MoefiedElectraForTokenClassification(MoefiedMixin, ElectraForTokenClassification):
    _auto_class = "AutoModelForTokenClassification"


class MoefiedElectraForQuestionAnswering(MoefiedMixin, ElectraForQuestionAnswering):
    _auto_class = "AutoModelForQuestionAnswering"


class MoefiedElectraForMultipleChoice(MoefiedMixin, ElectraForMultipleChoice):
    _auto_class = "AutoModelForMultipleChoice"


class MoefiedElectraForPreTraining(MoefiedMixin, ElectraForPreTraining):
    _auto_class = "AutoModelForPreTraining"
