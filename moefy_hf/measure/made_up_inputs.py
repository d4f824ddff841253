"""Make up a small random batch on which a transformers model can be run, whatever its modality.

The signature of the model's `forward` says which inputs there are, and its configuration says how large they have to
be. Both leave questions open, such as which axis of a spectrogram is time. So a model is given one batch after the
other, simple ones first, and the first on which it runs is returned.
"""

import inspect
import itertools
from collections.abc import Iterator

import torch
from transformers import PreTrainedModel

from ..errors import UnsupportedModel
from .input_shapes import SHAPES, Sizes

Batch = dict[str, torch.Tensor]
MOST_SHAPES = 16  # tried for one choice of inputs
TEXT = ("input_ids", "decoder_input_ids")
COMPANIONS = {  # what a model needs to make sense of another input, where its forward has it
    "input_ids": ("attention_mask",),
    "pixel_values": (
        *("grid_thw", "image_grid_thw", "image_grid_hw", "spatial_shapes", "target_sizes", "merge_sizes"),
        *("image_sizes", "image_attention_mask", "image_embeds_position_mask"),
    ),
    "spatial_shapes": ("pixel_attention_mask",),
    "input_features": ("input_features_mask",),
    "query_embeds": ("encoder_hidden_states",),
}
ONLY_IF_REQUIRED = {  # they take the place of other inputs
    *("hidden_states", "inputs_embeds", "query_embeds", "inputs", "encoder_hidden_states"),
    *("qformer_input_ids", "attention_mask"),
}


def made_up_batch(model: PreTrainedModel, *, tokens: int = 16, batch: int = 2, seed: int = 0) -> Batch:
    """Make a random batch and return it, after `model` has run on it without an error.

    Text is random ids without special tokens. A model that runs on text alone gets nothing else. Others get the input
    that their `main_input_name` says, then that with text, then all that can be made. The model's weights, its mode
    and the global random state stay as they are.

    Args:
        model: The model; the batch is on its device, and floating-point inputs have its dtype.
        tokens: Length of texts; the length of sound, in windows of the first layers, is about the same.
        batch: Number of examples; one where a model takes no more, as classifiers without a padding token.
        seed: Of the random inputs; the same seed makes the same batch.

    Returns:
        Inputs by their names in `forward`, such as `input_ids` (batch, tokens).

    Raises:
        UnsupportedModel: The model ran on none of the batches; the message says which, and why.

    Example:
        >>> batch = made_up_batch(AutoModel.from_pretrained("google-bert/bert-base-uncased"))
        >>> batch["input_ids"].shape
        torch.Size([2, 16])
    """
    failures: dict[str, str] = {}
    for rows, names in itertools.product(dict.fromkeys((batch, 1)), _choices(model)):
        for candidate in _batches(model, names, tokens, rows, seed):
            error = _error_of(model, candidate)
            if error is None:
                return candidate
            failures.setdefault(" + ".join(candidate), error)
    tried = "; ".join(f"{inputs} ({error})" for inputs, error in failures.items()) or _unknown(model)
    raise UnsupportedModel(
        f"no inputs could be made up for {type(model).__name__}; pass a calibration batch. Tried: {tried}"
    )


def _required(model: PreTrainedModel) -> list[str]:
    """Return the names of the inputs that have no default."""
    parameters = inspect.signature(model.forward).parameters.values()
    return [one.name for one in parameters if one.default is one.empty and one.kind is one.POSITIONAL_OR_KEYWORD]


def _unknown(model: PreTrainedModel) -> str:
    """Say why there was nothing to try."""
    unknown = ", ".join(name for name in _required(model) if name not in SHAPES)
    return f"nothing, because no rule makes {unknown}" if unknown else "nothing, because it has no forward of its own"


def _choices(model: PreTrainedModel) -> Iterator[list[str]]:
    """Yield which inputs to try together, few first; every choice has the inputs without a default."""
    parameters, required = inspect.signature(model.forward).parameters, _required(model)
    main = [model.main_input_name] if isinstance(model.main_input_name, str) else list(model.main_input_name)
    everything = [name for name in SHAPES if name not in ONLY_IF_REQUIRED]
    seen: list[list[str]] = []
    decoded = [[*main, "decoder_input_ids"], ["input_values", "decoder_input_ids"]]
    for wanted in (TEXT, main, *decoded, [*main, *TEXT], [*main, *TEXT, "bbox"], everything):
        names = [name for name in (*required, *wanted) if name in parameters]
        for name in names:  # the list grows on the way, because companions may have companions
            names += [one for one in COMPANIONS.get(name, ()) if one in parameters and one not in names]
        names = [name for name in parameters if name in names and (name in SHAPES or name in required)]
        if names and names not in seen and set(names) <= SHAPES.keys():
            seen.append(names)
            yield names


def _batches(model: PreTrainedModel, names: list[str], tokens: int, batch: int, seed: int) -> Iterator[Batch]:
    """Yield batches of the named inputs, in all combinations of their possible shapes."""
    sizes = Sizes(model, tokens, batch, seed)
    options = [SHAPES[name](sizes) for name in names]
    for values in itertools.islice(itertools.product(*options), MOST_SHAPES):
        yield {
            name: value.to(model.device, model.dtype if value.is_floating_point() else None)
            for name, value in zip(names, values, strict=True)
        }


@torch.no_grad()
def _error_of(model: PreTrainedModel, batch: Batch) -> str | None:
    """Run the model in evaluation mode, and return what goes wrong in one line, or None."""
    training = [module for module in model.modules() if module.training]
    devices = [model.device] if model.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices):
            model.eval()(
                **{name: value.clone() for name, value in batch.items()}
            )  # a few models write to their inputs
    except Exception as error:  # a model's code may raise anything about inputs that it was not made for
        return f"{type(error).__name__}: {' '.join(str(error).split())[:150]}"
    finally:
        for module in training:
            module.training = True
    return None
