"""PyTorch with the matrices of Linears in 8 bits, by torchao, without torch.compile."""

import copy
from collections.abc import Callable, Collection

from torch import nn
from transformers import PreTrainedModel

from ..models import variants
from .base import Engine, Running, Subject
from .pytorch import KINDS, running


class TorchAo(Engine):
    """Quantises weights when loading, and inputs as they come.

    The MoEfied model keeps its FFNs in float32: what computes selected experts alone reads float32 weights.
    """

    modules, distribution, extra = ("torchao",), "torchao", "torchao"
    kinds = tuple(KINDS)

    def dense(self, subject: Subject) -> Running:
        shared = {id(param): param for param in subject.dense.parameters()}
        return running(quantised(copy.deepcopy(subject.dense, shared), ()))

    def moefied(self, subject: Subject) -> Running:
        (model,) = variants(subject.moefied, ("auto",)).values()
        ffns = {id(linear) for site in model.moe_sites() for linear in (site.gate, site.up, site.down)}
        return running(quantised(model, ffns))


def quantised(model: PreTrainedModel, left: Collection[int]) -> PreTrainedModel:
    """Replace the weights of Linears, in place; return the model.

    Args:
        model: whose other weights may be another model's, too.
        left: ids of Linears that stay as they are.
    """
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    chosen: Callable[[nn.Module, str], bool] = lambda module, name: (  # noqa: E731
        isinstance(module, nn.Linear) and id(module) not in left
    )
    quantize_(model, Int8DynamicActivationInt8WeightConfig(), filter_fn=chosen)
    return model
