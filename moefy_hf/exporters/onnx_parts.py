"""The ONNX files that a model becomes, each with its inputs, its outputs and examples of both.

A model that generates text has a cache of keys and values. In a graph they are tensors, by the names of optimum:

- decoders: `model.onnx`, which takes past keys and values of any number of tokens, also none;
- encoder-decoders: `encoder_model.onnx`, `decoder_model.onnx` for the first step, which also gives keys and values of
  the encoder's output, and `decoder_with_past_model.onnx` for all further ones;
- all others: `model.onnx`.

Whatever a graph is to give comes from one run of the whole text: keys and values of its first tokens are the past of
the others.
"""

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, EncoderDecoderCache

from ..errors import UnsupportedModel
from ..loading import MoefiedModel
from ..measure.made_up_inputs import Batch, made_up_batch
from .onnx_modules import Decoder, DecoderOfTwo, Positional, by_layer, cache_name, tensors_of

Axes = dict[str, dict[int, str]]  # of inputs and outputs: which axes may have any size, and how optimum calls them
ROWS, TOKENS, SOURCE, TARGET = "batch_size", "sequence_length", "encoder_sequence_length", "decoder_sequence_length"
TEXT = {"input_ids": (ROWS, TOKENS)}
TEXT |= {"attention_mask": TEXT["input_ids"], "token_type_ids": TEXT["input_ids"]}
CHOICES = (ROWS, "num_choices", TOKENS)
PAIR = ("key", "value")


@dataclass(frozen=True)
class Example:
    """What a graph gives for some inputs.

    Attributes:
        kind: of inputs: "texts", "images", "prompt" (no past), "step" (a token after a past), "steps" (several).
        inputs: by name, in the order in which the graph takes them.
        outputs: by name, in order.
        real: of some outputs, which of their numbers belong to tokens; those of padding are not compared.
    """

    kind: str
    inputs: Batch
    outputs: Batch
    real: Batch


@dataclass(frozen=True)
class Part:
    """One ONNX file.

    Attributes:
        file: its name.
        module: takes the inputs in order, and returns the outputs in order.
        examples: of each batch as many.
        axes: of inputs, and of outputs that do not get them from the inputs.
        batches: how many there are.
    """

    file: str
    module: nn.Module
    examples: list[Example]
    axes: Axes
    batches: int

    @property
    def traced(self) -> Example:
        """Return the first example."""
        return self.examples[0]

    @property
    def compared(self) -> list[Example]:
        """Return the examples of all batches but the first, which only is for tracing."""
        return self.examples[len(self.examples) // self.batches :]


def parts_of(model: MoefiedModel, batches: Iterable[Mapping[str, Any]]) -> list[Part]:
    """Return the files that a model becomes.

    Args:
        model: running masked, in evaluation mode.
        batches: of the examples. The first is traced, which takes sizes of 0 and 1 for fixed ones.

    Raises:
        UnsupportedModel: it reads neither texts nor images, or its cache holds other things than keys and values.
    """
    given = list(batches)
    if not model.can_generate():
        return [single_part(model, [inputs_for(model, batch) for batch in given])]
    make = encoder_decoder_parts if model.config.is_encoder_decoder else decoder_parts
    try:
        return make(model, given)
    except UnsupportedModel:
        raise
    except Exception as error:  # a model's code may raise anything about a cache that it was not made for
        reason = " ".join(str(error).split())[:200]
        raise UnsupportedModel(
            f"{model._get_name()} does not run with a cache of keys and values alone, which ONNX graphs have: {reason}"
        ) from error


# ---- one graph


def single_part(model: MoefiedModel, batches: list[Batch]) -> Part:
    """Return the file of a model that generates nothing."""
    kind = "texts" if "input_ids" in batches[0] else "images"
    examples = [Example(kind, batch, named_outputs(model, batch), {}) for batch in batches]
    names, axes = list(batches[0]), {name: axes_of(name, value) for name, value in batches[0].items()}
    return Part("model.onnx", Positional(model, names, list(examples[0].outputs)), examples, axes, len(examples))


def inputs_for(model: MoefiedModel, batch: Mapping[str, Any]) -> Batch:
    """Return the inputs of an exported model, of a batch: also the token types that a tokenizer would give.

    Raises:
        UnsupportedModel: they are neither texts nor images.
    """
    named = {name: batch[name] for name in (*TEXT, "pixel_values") if name in batch}
    alone = not {"decoder_input_ids", "input_features", "input_values"} & set(batch)
    if "input_ids" in named and "pixel_values" not in named and alone:
        named.setdefault("attention_mask", torch.ones_like(named["input_ids"]))
        if getattr(model.config, "type_vocab_size", 0) > 1:
            named.setdefault("token_type_ids", torch.zeros_like(named["input_ids"]))
    elif list(named) != ["pixel_values"]:
        names = ", ".join(batch)
        hint = f". It is {composite(model)}" if model.config.sub_configs else ""
        raise UnsupportedModel(
            f"{model._get_name()} reads {names}: ONNX is written of models of texts or of images{hint}"
        )
    return named


def composite(model: MoefiedModel) -> str:
    """Return of what a composite model is made, and what would do instead."""
    towers = ", ".join(model.config.sub_configs)
    return f"made of {towers}: export one of these models by itself, loaded and converted alone"


def made_up_batches(model: MoefiedModel, shapes: Iterable[tuple[int, int]] = ((1, 11), (3, 16))) -> list[Batch]:
    """Return random inputs, by rows and tokens; the last of several texts is padded."""
    found = [made_up_batch(model, tokens=tokens, batch=rows, seed=rows) for rows, tokens in shapes]
    for batch in found:
        if "input_ids" in batch and len(batch["input_ids"]) > 1:
            batch["attention_mask"] = torch.ones_like(batch["input_ids"])
            batch["attention_mask"][-1, ..., -3:] = 0
    return found


def named_outputs(model: MoefiedModel, batch: Batch) -> Batch:
    """Return the output tensors of a model, by their names."""
    output = model(**batch, return_dict=True)
    return {name: value for name, value in output.items() if torch.is_tensor(value) and value.is_floating_point()}


def axes_of(name: str, value: torch.Tensor) -> dict[int, str]:
    """Return which axes of an input may have any size, with the names that optimum gives them."""
    if name in TEXT:
        return dict(enumerate(CHOICES if value.dim() == 3 else TEXT[name]))
    return {0: ROWS}


# ---- decoders


def decoder_parts(model: MoefiedModel, batches: list[Mapping[str, Any]]) -> list[Part]:
    """Return the file of a decoder; it is traced with several tokens after a past."""
    examples = [example for batch in batches for example in decoder_examples(model, batch)]
    inputs = [name for name in examples[0].inputs if not name.startswith("past_")]
    past, present = "past_sequence_length", f"past_{TOKENS} + {TOKENS}"
    axes: Axes = {name: {0: ROWS, 1: present if name == "attention_mask" else TOKENS} for name in (*inputs, "logits")}
    for name in (*examples[0].inputs, *examples[0].outputs):
        if name not in axes:
            axes[name] = {0: ROWS, 2: past if name.startswith("past_") else present}
    return [Part("model.onnx", Decoder(model, inputs), examples, axes, len(batches))]


def decoder_examples(model: MoefiedModel, batch: Mapping[str, Any]) -> list[Example]:
    """Return what a decoder gives for the second half of a batch, all of it, and its last tokens.

    Raises:
        UnsupportedModel: the model reads more than texts.
    """
    named = inputs_for(model, {name: value for name, value in batch.items() if name != "token_type_ids"})
    if "input_ids" not in named:
        raise UnsupportedModel(f"{model._get_name()} reads {', '.join(batch)}: ONNX decoders are written of texts")
    ids, mask = named["input_ids"], named["attention_mask"]
    texts: Batch = {"input_ids": ids, "attention_mask": mask}
    if "position_ids" in inspect.signature(model.forward).parameters:
        texts["position_ids"] = (mask.cumsum(-1) - 1).clamp_min(0)
    cache = DynamicCache()
    logits = model(**texts, **{cache_name(model): cache}, use_cache=True, return_dict=True).logits
    tensors, names = tensors_of(cache), [f"{layer}.{each}" for layer in range(len(cache.layers)) for each in PAIR]
    real = mask.bool()
    found, length = [], ids.shape[1]
    for kind, past in (("steps", length // 2), ("prompt", 0), ("step", length - 1)):
        inputs = {name: value if name == "attention_mask" else value[:, past:] for name, value in texts.items()}
        pasts = {f"past_key_values.{name}": each[:, :, :past] for name, each in zip(names, tensors, strict=True)}
        presents = {f"present.{name}": each for name, each in zip(names, tensors, strict=True)}
        of_tokens = {"logits": real[:, past:, None]} | dict.fromkeys(presents, real[:, None, :, None])
        found.append(Example(kind, inputs | pasts, {"logits": logits[:, past:]} | presents, of_tokens))
    return found


# ---- encoder-decoders


def encoder_decoder_parts(model: MoefiedModel, batches: list[Mapping[str, Any]]) -> list[Part]:
    """Return the three files of an encoder-decoder."""
    examples = [encoder_decoder_examples(model, batch) for batch in batches]
    encoders, starts = [found[0] for found in examples], [found[1] for found in examples]
    steps = [each for found in examples for each in found[2:]]
    width = encoders[0].outputs["last_hidden_state"].shape[-1]
    text, source, target = {0: ROWS, 1: SOURCE}, {0: ROWS, 2: SOURCE}, {0: ROWS, 1: TARGET}
    axes: Axes = {"attention_mask": text, "last_hidden_state": text}
    axes |= {"encoder_attention_mask": text, "encoder_hidden_states": text, "logits": target}
    for name in (*steps[0].inputs, *starts[0].outputs):
        if name.startswith(("past_", "present.")):
            past = f"past_{TARGET}" + ("" if name.startswith("past_") else f" + {TARGET}")
            axes[name] = source if ".encoder." in name else {0: ROWS, 2: past}
    first = axes | {name: {0: ROWS, 2: TARGET} for name in axes if name.startswith("present.") and ".decoder." in name}
    encoder = Positional(model.get_encoder(), list(encoders[0].inputs), list(encoders[0].outputs))
    decoders = DecoderOfTwo(model, False, width), DecoderOfTwo(model, True, width)
    files: list[tuple[str, nn.Module, list[Example], Axes]] = [
        ("encoder_model.onnx", encoder, encoders, axes | {"input_ids": text}),
        ("decoder_model.onnx", decoders[0], starts, first | {"input_ids": target}),
        ("decoder_with_past_model.onnx", decoders[1], steps, axes | {"input_ids": target}),
    ]
    return [Part(*file, len(batches)) for file in files]


def encoder_decoder_examples(model: MoefiedModel, batch: Mapping[str, Any]) -> list[Example]:
    """Return what encoder, decoder, and decoder with a past give for a batch; the last of these several times.

    Raises:
        UnsupportedModel: the model reads no texts.
    """
    if not {"input_ids", "decoder_input_ids"} <= set(batch):
        read = ", ".join(batch)
        raise UnsupportedModel(f"{model._get_name()} reads {read}: ONNX encoder-decoders are written of texts")
    ids, targets = batch["input_ids"], batch["decoder_input_ids"]
    mask = batch.get("attention_mask", torch.ones_like(ids))
    own, cross = DynamicCache(), DynamicCache()
    texts = {"input_ids": ids, "attention_mask": mask}
    cache = {cache_name(model): EncoderDecoderCache(own, cross)}
    output = model(**texts, decoder_input_ids=targets, **cache, use_cache=True, return_dict=True)
    hidden, logits = output.encoder_last_hidden_state, output.logits
    names = [f"{i}.{side}.{each}" for i in range(len(own.layers)) for side in ("decoder", "encoder") for each in PAIR]
    tensors = dict(zip(names, by_layer(own, cross), strict=True))
    start = {"input_ids": targets, "encoder_attention_mask": mask, "encoder_hidden_states": hidden}
    presents = {f"present.{name}": each for name, each in tensors.items()}
    found = [Example("texts", texts, {"last_hidden_state": hidden}, {})]
    found += [Example("prompt", start, {"logits": logits} | presents, {})]
    kept = {name: each for name, each in presents.items() if ".decoder." in name}
    length = targets.shape[1]
    for kind, past in (("steps", length // 2), ("step", length - 1)):
        inputs = {"input_ids": targets[:, past:], "encoder_attention_mask": mask}
        for name, each in tensors.items():
            inputs[f"past_key_values.{name}"] = each[:, :, :past] if ".decoder." in name else each
        found.append(Example(kind, inputs, {"logits": logits[:, past:]} | kept, {}))
    return found
