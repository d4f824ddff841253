"""MoEfied Marian."""

from transformers import MarianForCausalLM, MarianModel, MarianMTModel

from .moefied import MoefiedMixin


class MoefiedMarianModel(MoefiedMixin, MarianModel):
    _auto_class = "AutoModel"


class MoefiedMarianForCausalLM(MoefiedMixin, MarianForCausalLM):
    _auto_class = "AutoModelForCausalLM"


class MoefiedMarianMTModel(MoefiedMixin, MarianMTModel):
    _auto_class = "AutoModelForSeq2SeqLM"
