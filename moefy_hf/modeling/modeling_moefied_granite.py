"""MoEfied Granite."""

from transformers import GraniteForCausalLM, GraniteModel

from .moefied import MoefiedMixin


class MoefiedGraniteModel(MoefiedMixin, GraniteModel):
    _auto_class = "AutoModel"


class MoefiedGraniteForCausalLM(MoefiedMixin, GraniteForCausalLM):
    _auto_class = "AutoModelForCausalLM"
