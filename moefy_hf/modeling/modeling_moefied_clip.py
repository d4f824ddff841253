"""MoEfied CLIP."""

from transformers import CLIPForImageClassification, CLIPModel

from .moefied import MoefiedMixin


class MoefiedCLIPModel(MoefiedMixin, CLIPModel):
    _auto_class = "AutoModel"


class MoefiedCLIPForImageClassification(MoefiedMixin, CLIPForImageClassification):
    _auto_class = "AutoModelForImageClassification"
