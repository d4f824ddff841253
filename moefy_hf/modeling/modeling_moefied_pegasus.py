"""MoEfied Pegasus."""

from transformers import PegasusForCausalLM, PegasusForConditionalGeneration, PegasusModel

from .moefied import MoefiedMixin


class MoefiedPegasusModel(MoefiedMixin, PegasusModel):
    _auto_class = "AutoModel"


class MoefiedPegasusForCausalLM(MoefiedMixin, PegasusForCausalLM):
    _auto_class = "AutoModelForCausalLM"


class MoefiedPegasusForConditionalGeneration(MoefiedMixin, PegasusForConditionalGeneration):
    _auto_class = "AutoModelForSeq2SeqLM"
