"""PyTorch, which everything is compared with: the dense model by transformers, and the MoEfied one by this package."""

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from ...exporters.onnx_modules import cache_name
from .base import ENCODER, ENCODER_DECODER, LANGUAGE_MODEL, Batch, Engine, Running, Subject, kind_of
from .greedy import Writer


class TorchEncoder:
    """An encoder of transformers."""

    def __init__(self, model: PreTrainedModel):
        self.model = model

    def __call__(self, batch: Batch, /) -> Mapping[str, Any]:
        return self.model(**batch)


class TorchLanguageModel:
    """A language model of transformers, with its own cache."""

    def __init__(self, model: PreTrainedModel):
        self.model, self.cache = model, None
        self.keeps = cast(Any, model)._supports_logits_to_keep()
        self.cached = cache_name(model)

    def forget(self) -> None:
        self.cache = None

    def read(self, ids: torch.Tensor, last: bool = False) -> torch.Tensor:
        given: dict[str, Any] = {self.cached: self.cache, "use_cache": True}
        if last and self.keeps:
            given["logits_to_keep"] = 1
        output = self.model(input_ids=ids[None], **given)
        self.cache = output[self.cached]
        return output.logits[0, -1:] if last else output.logits[0]


class TorchEncoderDecoder(Writer):
    """An encoder-decoder of transformers, with its own cache."""

    def __init__(self, model: PreTrainedModel):
        super().__init__(model)
        self.model, self.cached = model, cache_name(model)
        self.given: dict[str, Any] = {}

    def encode(self, batch: Batch) -> torch.Tensor:
        return self.model.get_encoder()(**batch)[0]

    def begin(self, hidden: torch.Tensor, mask: torch.Tensor) -> None:
        encoded = BaseModelOutput(last_hidden_state=hidden)  # type: ignore[arg-type]
        self.given = {"encoder_outputs": encoded, "attention_mask": mask, "use_cache": True}

    def step(self, ids: torch.Tensor) -> torch.Tensor:
        output = self.model(decoder_input_ids=ids, **self.given)
        self.given[self.cached] = output[self.cached]
        return output.logits[:, -1]


KINDS: dict[str, Callable[[PreTrainedModel], Running]] = {
    ENCODER: TorchEncoder,
    LANGUAGE_MODEL: TorchLanguageModel,
    ENCODER_DECODER: TorchEncoderDecoder,
}


def running(model: PreTrainedModel) -> Running:
    """Return a model of transformers as engines give theirs."""
    return KINDS[kind_of(model)](model)


class PyTorch(Engine):
    """Runs models as they are."""

    modules, distribution, extra = ("torch",), "torch", ""
    kinds = tuple(KINDS)

    def dense(self, subject: Subject) -> Running:
        return running(subject.dense)

    def moefied(self, subject: Subject) -> Running:
        return running(subject.auto)
