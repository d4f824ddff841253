"""MoEfied CLIP."""

from transformers import CLIPForImageClassification, CLIPModel

from .moefied import MoefiedMixin


class MoefiedCLIPForZeroShotImageClassification(MoefiedMixin, CLIPModel):
    # CLIPModel once more: a class answers to one AutoModel class
    _auto_class = "AutoModelForZeroShotImageClassification"


class MoefiedCLIPModel(MoefiedMixin, CLIPModel):
    _auto_class = "AutoModel"


class MoefiedCLIPForImageClassification(MoefiedMixin, CLIPForImageClassification):
    _auto_class = "AutoModelForImageClassification"
