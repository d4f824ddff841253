"""Whole models: dense and routed in turns, generating or in batches."""

import copy
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from ..conversion.convert import moefy_
from ..errors import MoefyError
from ..loading import MoefiedModel, check_moefied, checkpoint_class
from ..measure.contexts import hooked
from ..modeling.section import Section
from ..runtime.cpu_kernel import CpuKernel
from ..runtime.sparse_ffn import SparseFfn
from ..runtime.torch_rows import FEW_TOKENS
from .layers import load_moefied, through_modules
from .presets import preset_config, shape_of
from .settings import CHECKED, DTYPES, TOLERANCE, Settings
from .timing import against, hardware, quartiles, take_turns, threads_set

Batch = dict[str, torch.Tensor]


def bench_model(
    settings: Settings, *, batch: int = 1, length: int = 128, new_tokens: int = 0, progress: bool = True
) -> dict[str, Any]:
    """Time a whole model on the CPU: a preset's, with random weights, or a checkpoint.

    Args:
        settings: what is timed, and how long.
        batch, length: texts at once, and the (random) tokens of each.
        new_tokens: generate so many, greedily; 0: a forward pass, of an encoder-decoder's encoder.

    Returns:
        `settings`, `hardware` and `rows`; `ratio` and `spread` as in `bench_ffns`.

    Raises:
        MoefyError: a number out of range, or a model that the settings do not fit.
    """
    if min(batch, length) < 1 or new_tokens < 0:
        raise MoefyError(f"batch, length and new tokens must be positive, got {batch}, {length}, {new_tokens}")
    with torch.no_grad(), threads_set(settings.threads):
        if settings.preset:
            config = preset_config(settings.source, settings.moefication().section())
            check_length(shape_of(config), length, new_tokens)
        dense, model = preset_models(settings) if settings.preset else checkpoint_models(settings)
        if model.main_input_name != "input_ids":
            raise MoefyError(
                f"a {model._get_name()} reads {model.main_input_name}, and this makes up texts: time it on real rows, "
                "with --against and --data"
            )
        check_length(model, length, new_tokens)
        generator = torch.Generator().manual_seed(0)
        vocabulary = model.config.get_text_config().vocab_size
        batches = []
        for _ in range(settings.rounds):
            ids = torch.randint(3, vocabulary, (batch, length), generator=generator)
            batches.append({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
        models = {"dense": dense, **variants(model, settings.implementations)}
        check(models, model, batches[0])
        taken = compare(models, batches, new_tokens, settings.seconds, f"bench {settings.source}", progress)
    described = settings.to_dict() | {"selection": Section(model.config).selection}
    described |= {"batch": batch, "length": length, "new_tokens": new_tokens}
    return {"settings": described, "hardware": hardware(), "rows": model_rows(taken, batch * length, new_tokens)}


def model_rows(taken: dict[str, list[float]], tokens: int, new_tokens: int) -> list[dict[str, Any]]:
    """Return a row per model; `taken` are the seconds of each, one per batch of `tokens`."""
    rows = []
    for name, seconds in taken.items():
        low, middle, high = quartiles(seconds)
        rows.append(
            {
                "implementation": name,
                "tokens": tokens,
                "new_tokens": new_tokens,
                **against(taken["dense"], seconds),
                "milliseconds": 1e3 * middle,
                "milliseconds_spread": [1e3 * low, 1e3 * high],
                "rounds": len(seconds),
            }
        )
    return rows


def preset_models(settings: Settings) -> tuple[PreTrainedModel, MoefiedModel]:
    """Return a preset's model with random weights, and the MoEfied one on the same weights."""
    config = preset_config(settings.source)
    moefication = settings.moefication()
    dense = checkpoint_class(config)._from_config(config, dtype=DTYPES[settings.dtype]).eval()
    model = copy.deepcopy(dense, {id(param): param for param in dense.parameters()})
    moefy_(model, moefication, progress=False)  # permutes the neurons of both
    return dense, check_moefied(model.eval())


def checkpoint_models(settings: Settings) -> tuple[PreTrainedModel, MoefiedModel]:
    """Return a checkpoint as the stock class loads it, and routed.

    Raises:
        MoefyError: as `load_moefied`.
    """
    model = load_moefied(settings)
    return model.stock_class().from_pretrained(settings.checkpoint, dtype=DTYPES[settings.dtype]).eval(), model


def check_length(model: PreTrainedModel, length: int, new_tokens: int) -> None:
    """Check that a model takes texts of `length` tokens, and can generate `new_tokens` more.

    Raises:
        MoefyError: it does not.
    """
    if new_tokens and not model.can_generate():
        raise MoefyError(f"{model._get_name()} is no language model: it generates nothing")
    positions = getattr(model.config, "max_position_embeddings", None)  # T5 has none
    if positions is not None and length + new_tokens > positions:
        raise MoefyError(f"{length} and {new_tokens} new tokens are more than the {positions} positions of the model")


def variants(model: MoefiedModel, names: Iterable[str]) -> dict[str, MoefiedModel]:
    """Return the model in each implementation, on the same weights but for those that sparse ones keep transposed."""
    shared: dict[int, Any] = {id(param): param for param in model.parameters()}
    for site in model.moe_sites():
        for linear in SparseFfn(CpuKernel(site)).transposed():
            weight = linear.get_parameter("weight")
            shared[id(weight)] = nn.Parameter(weight.detach().clone(), requires_grad=False)
    models: dict[str, MoefiedModel] = {}
    for name in names:
        models[name] = model if name == "masked" else copy.deepcopy(model, dict(shared))
        models[name].set_moe_implementation(name)
    return models


def forward(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    """Return what a forward pass gives first, logits or hidden states (B, L, ...); of an encoder-decoder, its
    encoder's."""
    return (model.get_encoder() if model.config.is_encoder_decoder else model)(**batch)[0]


def generate(model: PreTrainedModel, new_tokens: int, batch: Batch) -> torch.Tensor:
    """Return the texts with `new_tokens` more, generated greedily: (B, L + new_tokens)."""
    length = {"min_new_tokens": new_tokens, "max_new_tokens": new_tokens}
    return cast(Any, model).generate(**batch, do_sample=False, pad_token_id=0, **length)


def compare(
    models: Mapping[str, PreTrainedModel],
    batches: Sequence[Batch],
    new_tokens: int,
    seconds: float,
    title: str,
    progress: bool,
) -> dict[str, list[float]]:
    """Return the seconds of each model, one number per batch; see `take_turns`."""

    def prepare(turn: int) -> dict[str, Callable[[], Any]]:
        run = partial(generate, new_tokens=new_tokens) if new_tokens else forward
        return {name: partial(run, model, batch=batches[turn]) for name, model in models.items()}

    with torch.inference_mode():
        return take_turns(prepare, len(batches), seconds, title, progress)


def check(models: Mapping[str, PreTrainedModel], masked: MoefiedModel, batch: Batch) -> None:
    """Check before anything is timed that every FFN of every implementation gives what the masked one does.

    Inputs are the same, and the median token counts: rounding may choose another expert at a few.

    Raises:
        RuntimeError: it does not.
    """
    inputs: list[torch.Tensor] = []
    sites = masked.moe_sites()
    hooks = [site.first.register_forward_pre_hook(lambda linear, args: inputs.append(args[0])) for site in sites]
    with torch.inference_mode():
        with hooked(hooks):
            probe(masked, batch)
        for model in models.values():
            if model is not masked:
                probe(model, batch)  # the first call of a model prepares what later ones use
        for name, count in itertools.product(models.keys() - {"dense", "masked"}, (FEW_TOKENS, CHECKED)):
            for site, other, x in zip(sites, check_moefied(models[name]).moe_sites(), inputs, strict=True):
                x = x.flatten(0, -2)[:count]
                expected, output = through_modules(site, x), through_modules(other, x)
                error = ((output - expected).norm(dim=-1) / expected.norm(dim=-1)).median()
                if not error <= TOLERANCE[str(x.dtype).removeprefix("torch.")]:
                    raise RuntimeError(f"{site.name}: {name!r} is {error:.1%} off the masked FFN: nothing was timed")


def probe(model: PreTrainedModel, batch: Batch) -> None:
    """Run a batch so that every FFN works: a decoder reads the beginning of the texts, too."""
    if model.config.is_encoder_decoder:
        model(**batch, decoder_input_ids=batch["input_ids"][:, :8])
    else:
        model(**batch)
