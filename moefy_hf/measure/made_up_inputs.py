"""Make up a small random batch on which a transformers model can be run, whatever its modality.

The signature of the model's `forward` says which inputs there are, and its configuration says how large they have to
be. Both leave questions open, such as which axis of a spectrogram is time. So a model is given one batch after the
other, simple ones first, and the first on which it runs is returned.
"""

import inspect
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..errors import UnsupportedModel

Batch = dict[str, torch.Tensor]
MOST_TRIES = 24  # of one choice of inputs, which differ in their shapes
SPECIAL = ("_token_id", "_token_ids", "_token_index", "_token_indices", "_id", "_ids")  # ends of names of special ids


def made_up_batch(model: PreTrainedModel, *, tokens: int = 16, batch: int = 2, seed: int = 0) -> Batch:
    """Make a random batch and return it, after `model` has run on it without an error.

    Text is random ids without special tokens, and a model that takes text alone gets nothing else. Otherwise it gets
    the input that its `main_input_name` says, then that with text, then all that can be made. The model's weights,
    buffers, mode and the global random state stay as they are.

    Args:
        model: The model; the batch is on its device, and floating-point inputs have its dtype.
        tokens: Length of texts, and of what becomes a sequence of about this length.
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
    tried = "; ".join(f"{inputs} ({error})" for inputs, error in failures.items()) or "nothing, for want of a rule"
    raise UnsupportedModel(
        f"no inputs could be made up for {type(model).__name__}, so give calibration batches; tried: {tried}"
    )


def _choices(model: PreTrainedModel) -> Iterator[list[str]]:
    """Yield which inputs to try together, few first; every choice has the inputs without a default."""
    parameters = inspect.signature(type(model).forward).parameters
    required = [
        name
        for name, parameter in parameters.items()
        if parameter.default is parameter.empty
        and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
        and name != "self"
    ]
    main = [model.main_input_name] if isinstance(model.main_input_name, str) else list(model.main_input_name)
    seen: list[list[str]] = []
    for wanted in (TEXT, main, [*main, "decoder_input_ids"], [*main, *TEXT], [*main, *TEXT, "bbox"], WAVES, EVERYTHING):
        names = [*required, *wanted]
        for name in names:  # grows on the way: companions may have companions
            names += [one for one in COMPANIONS.get(name, ()) if one not in names]
        names = [name for name in parameters if name in names and (name in INPUTS or name in required)]
        if names and names not in seen and set(names) <= INPUTS.keys():
            seen.append(names)
            yield names


def _batches(model: PreTrainedModel, names: list[str], tokens: int, batch: int, seed: int) -> Iterator[Batch]:
    """Yield batches of the named inputs, in all combinations of their possible shapes."""
    sizes = _Sizes(model, tokens, batch, seed)
    options = [INPUTS[name](sizes) for name in names]
    for values in itertools.islice(itertools.product(*options), MOST_TRIES):
        yield {
            name: value.to(model.device, model.dtype if value.is_floating_point() else None)
            for name, value in zip(names, values, strict=True)
        }


@torch.no_grad()
def _error_of(model: PreTrainedModel, batch: Batch) -> str | None:
    """Return what goes wrong when the model is run in evaluation mode, in one line, or None."""
    training = {module for module in model.modules() if module.training}
    devices = [model.device] if model.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices):
            model.eval()(**batch)
    except Exception as error:  # a model's code may raise anything about inputs that it was not made for
        return f"{type(error).__name__}: {' '.join(str(error).split())[:150]}"
    finally:
        for module in training:
            module.training = True
    return None


class _Sizes:
    """What the configuration and the weights say about the sizes of inputs, and random tensors of such sizes."""

    def __init__(self, model: PreTrainedModel, tokens: int, batch: int, seed: int):
        self.tokens, self.batch = tokens, batch
        self.generator = torch.Generator().manual_seed(seed)
        self.settings = list(_settings(model.config.to_dict()))
        self.parameters = inspect.signature(type(model).forward).parameters
        self.choices = type(model).__name__.endswith("ForMultipleChoice")
        try:
            embeddings = model.get_input_embeddings()
        except (NotImplementedError, AttributeError):  # transformers has no other way to say that there are none
            embeddings = None
        self.vocabulary = embeddings.num_embeddings if isinstance(embeddings, nn.Embedding) else None

    def find(self, *names: str, part: str = "", default: Any = None) -> Any:
        """Return a setting by the first of its names; it is sought in `part`, then anywhere."""
        for within in (part, ""):
            for name in names:
                for path, key, value in self.settings:
                    if key == name and within in path and value is not None:
                        return value
        return default

    def noise(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.generator)

    def whole(self, high: int, *shape: int) -> torch.Tensor:
        """Return whole numbers from 0 to below `high`."""
        return torch.randint(high, shape, generator=self.generator)

    def ids(self, vocabulary: int) -> torch.Tensor:
        """Return (batch, tokens), ids of tokens that are not special."""
        allowed = torch.ones(vocabulary, dtype=torch.bool)
        for _, key, value in self.settings:
            if str(key).endswith(SPECIAL):  # some dictionaries of settings have numbers as keys
                for one in value if isinstance(value, list | tuple) else [value]:
                    if type(one) is int and 0 <= one < vocabulary:
                        allowed[one] = False
        usable = allowed.nonzero().flatten()
        return usable[self.whole(len(usable), self.batch, self.tokens)]

    def texts(self) -> list[torch.Tensor]:
        """Return ids, and the same with an end at the end; two choices for each example of multiple choice."""
        vocabulary = self.vocabulary or self.find("vocab_size", part="text", default=100)
        plain, end = self.ids(vocabulary), self.find("eos_token_id")
        ended = plain.clone()
        ended[:, -1] = end if type(end) is int else 0
        return [torch.stack([plain, ended], 1)] if self.choices else [plain, ended]

    def mask(self) -> torch.Tensor:
        return torch.ones(self.batch, self.tokens, dtype=torch.long)

    def image_sides(self) -> tuple[int, int]:
        """Return height and width of an image; where the configuration has none, 64 pixels."""
        size = self.find("image_size", "img_size", part="vision", default=64)
        if isinstance(size, dict):
            return size["height"], size["width"]
        return (size, size) if isinstance(size, int) else (size[0], size[-1])

    def images(self) -> list[torch.Tensor]:
        """Return images in the forms that models take: flat patches, (B, C, H, W), or several images an example."""
        channels = self.find("num_channels", "in_channels", "in_chans", part="vision", default=3)
        channels = channels if isinstance(channels, int) else 3
        patch = self.find("patch_size", part="vision", default=16)
        patch = patch if isinstance(patch, int) else patch[-1]
        values = channels * patch**2 * self.find("temporal_patch_size", part="vision", default=1)
        grids = self.parameters.keys() & {"grid_thw", "image_grid_thw", "image_grid_hw"}
        flat = [self.noise(self.batch * GRID**2, values)] if grids else []
        if self.parameters.keys() & {"spatial_shapes", "pixel_position_ids", "image_position_ids"}:
            flat = [self.noise(self.batch, GRID**2, values)]
        image = self.noise(self.batch, channels, *self.image_sides())
        frames = self.find("num_frames", "frames_per_clip", part="vision", default=2)
        frames_first = image[:, None].repeat_interleave(frames, 1)
        packed = [self.noise(self.batch * GRID**2, channels, patch, patch)] if grids else []
        return [*flat, *packed, image, frames_first]

    def videos(self) -> list[torch.Tensor]:
        """Return (B, F, C, H, W)."""
        return self.images()[-1:]

    def grids(self, *grid: int) -> list[torch.Tensor]:
        """Return one grid of patches for each example."""
        return [torch.tensor([grid] * self.batch)]

    def waves(self) -> list[torch.Tensor]:
        """Return sound as waves (B, samples) or (B, 1, samples), or as spectra (B, frames, bins)."""
        strides = self.find("conv_stride", "upsampling_ratios", "downsampling_ratios", default=[256])
        wave = self.noise(self.batch, max(7680, math.prod(strides) * self.tokens))
        bins = self.find("num_mel_bins", default=80)
        return [wave, wave[:, None], self.noise(self.batch, self.find("max_length", default=self.tokens), bins)]

    def frames(self) -> int:
        """Return how many frames a spectrogram has: all that positions of the encoder allow, at most 3000."""
        return min(2 * self.find("max_source_positions", part="audio", default=4 * self.tokens), 3000)

    def spectra(self) -> list[torch.Tensor]:
        """Return spectrograms, with time last or first."""
        bins = self.find(*BINS, part="audio", default=80) * self.find("num_stacked_frames", part="audio", default=1)
        last = self.noise(self.batch, bins, self.frames())
        return [last, last.transpose(1, 2).contiguous(), last[:, None].transpose(2, 3).contiguous()]

    def vectors(self) -> list[torch.Tensor]:
        """Return (B, tokens, hidden size)."""
        size = self.find("hidden_size", "d_model", default=64)
        return [self.noise(self.batch, self.tokens, size)]

    def hidden_states(self) -> list[torch.Tensor]:
        """Return what `forward` calls hidden states: patches in vision towers, else vectors."""
        return self.images() if "grid_thw" in self.parameters else self.vectors()

    def history(self) -> int:
        """Return how many points of time a model of time series looks at."""
        lags = self.find("lags_sequence", default=[0])
        return self.find("context_length", default=self.tokens) + max(lags)

    def series(self) -> list[torch.Tensor]:
        """Return (B, history), (B, history, channels)."""
        series = self.noise(self.batch, self.history(), self.find("num_input_channels", "input_size", default=1))
        return [series[..., 0], series]

    def per_step(self, *names: str, steps: int = 0) -> list[torch.Tensor]:
        """Return (B, steps, size), by the first name of a size that the configuration has."""
        return [self.noise(self.batch, steps or self.tokens, self.find(*names, default=1))]

    def boxes(self) -> list[torch.Tensor]:
        """Return (B, tokens, 4), boxes of tokens on a page: whole numbers for embeddings, or eight fractions."""
        whole = self.whole(32, self.batch, self.tokens, 4).sort(-1).values
        return [whole, whole.repeat(1, 1, 2) / 64]


GRID = 4  # patches of an image in each direction, where a model takes any number
BINS = ("num_mel_bins", "n_mel_bins", "input_feat_size", "feature_projection_input_dim", "input_dim", "feature_size")


def _settings(config: dict[str, Any], path: str = "") -> Iterator[tuple[str, str, Any]]:
    """Yield (path of the part, name, value) of every setting, a part's own before those of its parts."""
    parts = {key: value for key, value in config.items() if isinstance(value, dict)}
    yield from ((path, key, value) for key, value in config.items() if key not in parts or "size" in key)
    for key, value in parts.items():
        if "label" not in key:
            yield from _settings(value, f"{path}{key}.")


def _ones(*names: str) -> Callable[[_Sizes], list[torch.Tensor]]:
    """Return a maker of masks (B, size) without padding; the size is found by its method's name."""
    return lambda sizes: [torch.ones(sizes.batch, getattr(sizes, name)(), dtype=torch.long) for name in names]


INPUTS: dict[str, Callable[[_Sizes], list[torch.Tensor]]] = {
    "input_ids": _Sizes.texts,
    "decoder_input_ids": lambda sizes: [sizes.ids(sizes.find("vocab_size", part="decoder", default=100))],
    "qformer_input_ids": lambda sizes: [sizes.ids(sizes.find("vocab_size", part="qformer", default=100))],
    "attention_mask": lambda sizes: [torch.ones_like(sizes.texts()[0]) if sizes.choices else sizes.mask()],
    "bbox": _Sizes.boxes,
    "pixel_values": _Sizes.images,
    "pixel_values_videos": _Sizes.videos,
    "hidden_states": _Sizes.hidden_states,
    "image_attention_mask": lambda sizes: [torch.ones(sizes.batch, sizes.tokens, 2, dtype=torch.long)],
    "grid_thw": lambda sizes: sizes.grids(1, GRID, GRID),
    "image_grid_thw": lambda sizes: sizes.grids(1, GRID, GRID),
    "image_grid_hw": lambda sizes: sizes.grids(GRID, GRID),
    "spatial_shapes": lambda sizes: sizes.grids(GRID, GRID),
    "target_sizes": lambda sizes: sizes.grids(GRID, GRID),
    "image_sizes": lambda sizes: sizes.grids(*sizes.image_sides()),
    "merge_sizes": lambda sizes: [torch.ones(sizes.batch, dtype=torch.long)],
    "pixel_attention_mask": lambda sizes: [torch.ones(sizes.batch, GRID**2, dtype=torch.long)],
    "pixel_position_ids": lambda sizes: [
        torch.cartesian_prod(torch.arange(GRID), torch.arange(GRID)).repeat(sizes.batch, 1, 1)
    ],
    "input_values": _Sizes.waves,
    "input_features": _Sizes.spectra,
    "audio_mel": lambda sizes: sizes.spectra()[1:2],
    "input_features_mask": lambda sizes: [torch.ones(sizes.batch, sizes.frames(), dtype=torch.bool)],
    "audio_mel_mask": lambda sizes: [torch.zeros(sizes.batch, sizes.frames(), dtype=torch.bool)],
    "query_embeds": _Sizes.vectors,
    "inputs_embeds": _Sizes.vectors,
    "inputs": _Sizes.vectors,
    "context_hidden_states": _Sizes.vectors,
    "noise_embeds": _Sizes.vectors,
    "latents": lambda sizes: [sizes.vectors()[0].transpose(1, 2).contiguous(), sizes.vectors()[0]],
    "past_values": _Sizes.series,
    "past_observed_mask": lambda sizes: [torch.ones_like(series) for series in sizes.series()],
    "past_time_features": lambda sizes: sizes.per_step("num_time_features", steps=sizes.history()),
    "past_values_padding": lambda sizes: [torch.zeros(sizes.batch, sizes.history(), dtype=torch.long)],
    "freq": lambda sizes: [torch.zeros(sizes.batch, 1, dtype=torch.long)],
    "states": lambda sizes: sizes.per_step("state_dim"),
    "actions": lambda sizes: sizes.per_step("act_dim"),
    "rewards": lambda sizes: sizes.per_step("reward_dim"),
    "returns_to_go": lambda sizes: sizes.per_step("return_dim"),
    "timesteps": lambda sizes: [torch.arange(sizes.tokens).repeat(sizes.batch, 1)],
    "visual_feats": lambda sizes: sizes.per_step("visual_feat_dim"),
    "visual_pos": lambda sizes: sizes.per_step("visual_pos_dim"),
}
EMBEDDED = ("hidden_states", "inputs_embeds", "query_embeds", "inputs", "qformer_input_ids")  # given if they have to be
EVERYTHING = tuple(name for name in INPUTS if name not in EMBEDDED)
TEXT = ("input_ids", "decoder_input_ids")
WAVES = ("input_values", "decoder_input_ids")  # of models that take waves or spectra
COMPANIONS = {  # what a model needs to make sense of another input, where its forward has it
    "input_ids": ("attention_mask",),
    "pixel_values": (
        "grid_thw", "image_grid_thw", "image_grid_hw", "spatial_shapes", "target_sizes", "merge_sizes", "image_sizes",
    ),
    "spatial_shapes": ("pixel_attention_mask",),
    "input_features": ("input_features_mask",),
}  # fmt: skip
