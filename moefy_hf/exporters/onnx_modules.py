"""A model as a function of tensors alone, which is what torch.onnx writes: its cache as keys and values, in order."""

import inspect
from typing import Any, cast

import torch
from torch import nn
from transformers import DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput

from ..loading import MoefiedModel


class Positional(nn.Module):
    """A model that takes tensors in order, and gives some of its outputs in order."""

    def __init__(self, model: nn.Module, inputs: list[str], outputs: list[str]):
        super().__init__()
        self.model, self.inputs, self.outputs = model, inputs, outputs

    def forward(self, *values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        output = self.model(**dict(zip(self.inputs, values, strict=True)), return_dict=True)
        return tuple(output[name] for name in self.outputs)


class Decoder(nn.Module):
    """A decoder that takes past keys and values as tensors, and returns them with those of its tokens."""

    def __init__(self, model: MoefiedModel, inputs: list[str]):
        super().__init__()
        self.model, self.inputs, self.cache_name = model, inputs, cache_name(model)

    def forward(self, *values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        named, past = dict(zip(self.inputs, values, strict=False)), values[len(self.inputs) :]
        cache = DynamicCache([*zip(past[::2], past[1::2], strict=True)])
        output = self.model(**named, **{self.cache_name: cache}, use_cache=True, return_dict=True)
        return output.logits, *tensors_of(cache)


class DecoderOfTwo(nn.Module):
    """The decoder of an encoder-decoder: ids (B, T) and the encoder's mask (B, S), then what it has of the encoder.

    That is the encoder's output (B, S, d), or with `past` for each layer keys and values of past tokens, and of the
    encoder's output, whose width is `width`.
    """

    def __init__(self, model: MoefiedModel, past: bool, width: int):
        super().__init__()
        self.model, self.past, self.width, self.cache_name = model, past, width, cache_name(model)

    def forward(self, *values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ids, mask, *rest = values
        own, cross = DynamicCache(), DynamicCache()
        hidden = rest[0]
        if self.past:
            own = DynamicCache([*zip(rest[::4], rest[1::4], strict=True)])
            cross = DynamicCache([*zip(rest[2::4], rest[3::4], strict=True)])
            hidden = rest[0].new_zeros(*mask.shape, self.width)  # nothing is made of it but its shape
        output = self.model(
            decoder_input_ids=ids,
            attention_mask=mask,
            encoder_outputs=BaseModelOutput(last_hidden_state=hidden),
            **{self.cache_name: EncoderDecoderCache(own, cross)},
            use_cache=True,
            return_dict=True,
        )
        return output.logits, *(tensors_of(own) if self.past else by_layer(own, cross))


def cache_name(model: nn.Module) -> str:
    """Return what `forward` calls its cache, which depends on the version of transformers."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def tensors_of(cache: DynamicCache) -> list[torch.Tensor]:
    """Return the keys and the values (B, heads, T, width) of every layer in turns."""
    layers = cast(list[Any], cache.layers)  # of which there are kinds without keys
    return [tensor for layer in layers for tensor in (layer.keys, layer.values)]


def by_layer(own: DynamicCache, cross: DynamicCache) -> list[torch.Tensor]:
    """Return keys and values of every layer: of the decoder's tokens, then of the encoder's."""
    first, second = tensors_of(own), tensors_of(cross)
    return [each for i in range(0, len(first), 2) for each in (*first[i : i + 2], *second[i : i + 2])]
