"""MoEfied ViT."""

from transformers import ViTForImageClassification, ViTForMaskedImageModeling, ViTModel

from .moefied import MoefiedMixin


class MoefiedViTModel(MoefiedMixin, ViTModel):
    _auto_class = "AutoModel"


class MoefiedViTForImageClassification(MoefiedMixin, ViTForImageClassification):
    _auto_class = "AutoModelForImageClassification"


class MoefiedViTForMaskedImageModeling(MoefiedMixin, ViTForMaskedImageModeling):
    _auto_class = "AutoModelForMaskedImageModeling"
