"""PyTorch, which everything is compared with: the dense model by transformers, and the MoEfied one by this package."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from transformers import PreTrainedModel

from .base import ENCODER, ENCODER_DECODER, LANGUAGE_MODEL, Batch, Engine, Running, Subject, kind_of


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
        names = inspect.signature(model.forward).parameters
        self.cached = "cache" if "cache" in names else "past_key_values"  # as older versions of transformers call it

    def forget(self) -> None:
        self.cache = None

    def read(self, ids: torch.Tensor, last: bool = False) -> torch.Tensor:
        given: dict[str, Any] = {self.cached: self.cache, "use_cache": True}
        if last and self.keeps:
            given["logits_to_keep"] = 1
        output = self.model(input_ids=ids[None], **given)
        self.cache = output[self.cached]
        return output.logits[0, -1:] if last else output.logits[0]


class TorchEncoderDecoder:
    """An encoder-decoder of transformers."""

    def __init__(self, model: PreTrainedModel):
        self.model = model

    def encode(self, batch: Batch) -> torch.Tensor:
        return self.model.get_encoder()(**batch)[0]

    def generate(self, batch: Batch, most: int, least: int = 0) -> torch.Tensor:
        return cast(Any, self.model).generate(**batch, do_sample=False, max_new_tokens=most, min_new_tokens=least)


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
