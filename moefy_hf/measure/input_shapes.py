"""Say which shapes each input of a transformers model may have, and fill them with random values.

`SHAPES` has a row for each name in the signatures of `forward`. Sizes come from the configuration, where the same
thing has several names. An input with several possible shapes is a list of tensors, the likelier first.
"""

import inspect
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

GRID = 4  # patches of an image in each direction, where a model takes any number
IMAGE = 128  # pixels in each direction, where the configuration does not say
LONGEST = 3000  # frames of a spectrogram
SPECIAL = ("_token_id", "_token_ids", "_token_index", "_token_indices", "_id", "_ids")  # ends of names of special ids
BINS = ("num_mel_bins", "n_mel_bins", "input_feat_size", "feature_projection_input_dim", "input_dim", "feature_size")
# settings that are in the code of a model type, and not in its configuration
ASSUMED = {
    "depth_pro": {"image_size": 1536},
    "gemma4_audio": {"num_mel_bins": 128},
    "granite_speech5_ctc": {"num_stacked_frames": 4},
    "granite_speech5_encoder": {"num_stacked_frames": 4},
}


class Sizes:
    """What a model's configuration says about the sizes of its inputs, and random tensors of these sizes.

    B is the number of examples, and T of tokens.
    """

    def __init__(self, model: PreTrainedModel, tokens: int, batch: int, seed: int):
        self.batch = batch
        self.generator = torch.Generator().manual_seed(seed)
        assumed = ASSUMED.get(model.config.model_type, {})
        self.settings = [*_settings(assumed), *_settings(model.config.to_dict())]
        self.parameters = inspect.signature(model.forward).parameters
        self.multiple_choice = type(model).__name__.endswith("ForMultipleChoice")
        self.tokens = max(tokens, 2 * self.find("latent_query_num", default=0))  # an image becomes so many tokens
        try:
            embeddings = model.get_input_embeddings()
        except (NotImplementedError, AttributeError):  # transformers has no other way to say that there are none
            embeddings = None
        self.vocabulary = embeddings.num_embeddings if isinstance(embeddings, nn.Embedding) else None

    def find(self, *names: str, part: str = "", default: Any = None) -> Any:
        """Return a setting by the first of its names; it is sought in parts of this name, then anywhere."""
        for within in (part, ""):
            for name in names:
                for path, key, value in self.settings:
                    if key == name and within in path and value is not None:
                        return value
        return default

    def noise(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.generator)

    def ones(self, *shape: int) -> torch.Tensor:
        """Return (B, *shape), a mask without padding."""
        return torch.ones(self.batch, *shape, dtype=torch.long)

    def ids(self, vocabulary: int) -> torch.Tensor:
        """Return (B, T), ids of tokens that are not special."""
        allowed = torch.ones(vocabulary, dtype=torch.bool)
        for _, key, value in self.settings:
            if str(key).endswith(SPECIAL):  # some dictionaries of settings have numbers as keys
                for one in value if isinstance(value, list | tuple) else [value]:
                    if type(one) is int and 0 <= one < vocabulary:
                        allowed[one] = False
        usable = allowed.nonzero().flatten()
        return usable[torch.randint(len(usable), (self.batch, self.tokens), generator=self.generator)]

    def texts(self) -> list[torch.Tensor]:
        """Return (B, T): ids, and ids with an end; (B, 2, T) for multiple choice."""
        plain, end = (
            self.ids(self.vocabulary or self.find("vocab_size", part="text", default=100)),
            self.find("eos_token_id"),
        )
        if self.multiple_choice:
            return [torch.stack([plain, plain.flip(1)], 1)]
        ended = plain.clone()
        ended[:, -1] = end if type(end) is int else plain[:, -1]
        return [plain, ended]

    def decoder_texts(self) -> list[torch.Tensor]:
        """Return what a decoder has written: text (B, T), or several streams of codes for sound (B streams, T)."""
        ids = self.ids(self.find("vocab_size", part="decoder", default=100))
        return [ids, ids.repeat_interleave(self.find("num_codebooks", part="decoder", default=1), 0)]

    def boxes(self) -> list[torch.Tensor]:
        """Return (B, T, 4), places of tokens on a page as whole numbers, or (B, T, 8), corners as fractions."""
        whole = torch.randint(32, (self.batch, self.tokens, 4), generator=self.generator).sort(-1).values
        return [whole, whole.repeat(1, 1, 2) / 32]

    def image_sides(self) -> tuple[int, int]:
        """Return height and width of an image in pixels."""
        size = self.find("image_size", "img_size", "max_img_size", "crop_size", part="vision", default=IMAGE)
        if isinstance(size, dict):
            return size["height"], size["width"]
        return (size, size) if isinstance(size, int) else (size[0], size[-1])

    def patch_sizes(self) -> tuple[int, int, int]:
        """Return channels, side and number of frames of a patch."""
        channels = self.find("num_channels", "in_channels", "in_chans", part="vision", default=3)
        side = self.find("patch_size", part="vision", default=16)
        frames = self.find("temporal_patch_size", "patch_temporal", part="vision", default=1)
        return channels if isinstance(channels, int) else 3, side if isinstance(side, int) else side[-1], frames

    def images(self) -> list[torch.Tensor]:
        """Return images as patches, where `forward` has a grid for them; (B, C, H, W); (B, several, C, H, W)."""
        (channels, side, frames), patches = self.patch_sizes(), self.batch * GRID**2
        image = self.noise(self.batch, channels, *self.image_sides())
        count = self.find("num_frames", "frames_per_clip", part="vision", default=2)
        whole = [image, image[:, None].repeat_interleave(count, 1)]
        if self.parameters.keys() & {"grid_thw", "image_grid_thw", "image_grid_hw"}:
            flat = self.noise(patches, channels * side**2 * frames)
            return [flat, self.noise(patches, channels, side, side), *whole]
        if self.parameters.keys() & {"spatial_shapes", "pixel_position_ids", "image_position_ids"}:
            return [self.noise(self.batch, GRID**2, channels * side**2), *whole]
        if "target_sizes" in self.parameters:  # one strip of patches
            return [self.noise(1, channels, side, patches * side), *whole]
        return whole

    def waves(self) -> list[torch.Tensor]:
        """Return sound as (B, samples), (B, 1, samples), or as its spectra (B, frames, bins) or features (B, T, d)."""
        strides = self.find("conv_stride", "upsampling_ratios", "downsampling_ratios", default=[256])
        wave = self.noise(self.batch, max(7680, math.prod(strides) * self.tokens))
        frames, bins = self.find("max_length", default=self.tokens), self.find("num_mel_bins", default=80)
        return [wave, wave[:, None], self.noise(self.batch, frames, bins), *self.vectors()]

    def frames(self) -> int:
        """Return how many frames a spectrogram has: as many as an encoder with a fixed number of positions takes."""
        windows = 2 * self.find("n_window", part="audio", default=0)
        positions = self.find("max_source_positions", part="audio", default=4 * self.tokens)
        return windows or min(2 * positions, LONGEST)

    def spectra(self) -> list[torch.Tensor]:
        """Return spectrograms (B, bins, frames), (B, frames, bins) or (B, 1, frames, bins)."""
        bins = self.find(*BINS, part="audio", default=80) * self.find("num_stacked_frames", part="audio", default=1)
        last = self.noise(self.batch, bins, self.frames())
        first = last.transpose(1, 2).contiguous()
        return [last, first, first[:, None]]

    def vectors(self) -> list[torch.Tensor]:
        """Return (B, T, d)."""
        return self.steps("hidden_size", "d_model")

    def hidden_states(self) -> list[torch.Tensor]:
        """Return what `forward` calls hidden states: patches in vision towers, else vectors, or sound."""
        if "grid_thw" in self.parameters:
            return self.images()
        (vectors,) = self.vectors()
        return [vectors, vectors.transpose(1, 2).contiguous(), self.waves()[1]]

    def steps(self, *names: str, count: int = 0) -> list[torch.Tensor]:
        """Return (B, count, size), by default T; the size is the first of these settings."""
        return [self.noise(self.batch, count or self.tokens, self.find(*names, default=1))]

    def history(self) -> int:
        """Return how many points of time a model of time series looks at."""
        return self.find("context_length", default=self.tokens) + max(self.find("lags_sequence", default=[0]))

    def series(self) -> list[torch.Tensor]:
        """Return (B, history), or (B, history, channels)."""
        (series,) = self.steps("num_input_channels", "input_size", count=self.history())
        return [series[..., 0], series]


def _settings(config: dict[str, Any], path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield (path of the part, name, value) of every setting, a part's own before those of its parts."""
    parts = {key: value for key, value in config.items() if isinstance(value, dict)}
    yield from ((path, key, value) for key, value in config.items() if key not in parts or "size" in key)
    for key, value in parts.items():
        if "label" not in str(key):
            yield from _settings(value, f"{path}{key}.")


def _grid(*sizes_of_one: int) -> Callable[[Sizes], list[torch.Tensor]]:
    """Return a maker of (B, ...), the same sizes for each example."""
    return lambda sizes: [torch.tensor([sizes_of_one] * sizes.batch)]


def _steps(name: str) -> Callable[[Sizes], list[torch.Tensor]]:
    """Return a maker of (B, T, size), of the size with this name."""
    return lambda sizes: sizes.steps(name)


def _placed(sizes: Sizes) -> list[torch.Tensor]:
    """Return (B, T), which marks the tokens that an image takes the place of."""
    mask = torch.zeros(sizes.batch, sizes.tokens, dtype=torch.long)
    mask[:, : sizes.find("latent_query_num", default=0)] = 1
    return [mask]


PLACES = torch.cartesian_prod(torch.arange(GRID), torch.arange(GRID))
SHAPES: dict[str, Callable[[Sizes], list[torch.Tensor]]] = {
    "input_ids": Sizes.texts,
    "decoder_input_ids": Sizes.decoder_texts,
    "qformer_input_ids": lambda sizes: [sizes.ids(sizes.find("vocab_size", part="qformer", default=100))],
    "task_inputs": lambda sizes: [sizes.ones(sizes.find("task_seq_len", default=sizes.tokens))],
    "attention_mask": lambda sizes: [torch.ones_like(sizes.texts()[0])],
    "bbox": Sizes.boxes,
    "pixel_values": Sizes.images,
    "pixel_values_videos": lambda sizes: sizes.images()[-1:],
    "prompt_pixel_values": Sizes.images,
    "prompt_masks": Sizes.images,
    "hidden_states": Sizes.hidden_states,
    "grid_thw": _grid(1, GRID, GRID),
    "image_grid_thw": _grid(1, GRID, GRID),
    "image_grid_hw": _grid(GRID, GRID),
    "spatial_shapes": _grid(GRID, GRID),
    "target_sizes": _grid(GRID, GRID),
    "merge_sizes": lambda sizes: [torch.ones(sizes.batch, dtype=torch.long)],
    "image_sizes": lambda sizes: [torch.tensor([sizes.image_sides()] * sizes.batch)],
    "image_attention_mask": lambda sizes: [sizes.ones(sizes.tokens, 2)],
    "image_embeds_position_mask": _placed,
    "pixel_attention_mask": lambda sizes: [sizes.ones(GRID**2)],
    "pixel_position_ids": lambda sizes: [PLACES.repeat(sizes.batch, 1, 1)],
    "visual_feats": _steps("visual_feat_dim"),
    "visual_pos": _steps("visual_pos_dim"),
    "input_values": Sizes.waves,
    "decoder_input_values": Sizes.vectors,
    "input_features": Sizes.spectra,
    "input_features_mask": lambda sizes: [sizes.ones(sizes.frames()).bool()],
    "audio_mel": lambda sizes: sizes.spectra()[1:2],
    "audio_mel_mask": lambda sizes: [~sizes.ones(sizes.frames()).bool()],  # True is padding
    "inputs": lambda sizes: [*sizes.vectors(), *sizes.waves()],
    "inputs_embeds": Sizes.vectors,
    "query_embeds": Sizes.vectors,
    "encoder_hidden_states": lambda sizes: sizes.steps("encoder_hidden_size", "hidden_size"),
    "latents": lambda sizes: [sizes.vectors()[0].transpose(1, 2).contiguous(), *sizes.vectors()],
    "past_values": Sizes.series,
    "past_observed_mask": lambda sizes: [torch.ones_like(series) for series in sizes.series()],
    "past_time_features": lambda sizes: sizes.steps("num_time_features", count=sizes.history()),
    "past_values_padding": lambda sizes: [torch.zeros(sizes.batch, sizes.history(), dtype=torch.long)],
    "freq": lambda sizes: [torch.zeros(sizes.batch, 1, dtype=torch.long)],
    "states": _steps("state_dim"),
    "actions": _steps("act_dim"),
    "rewards": _steps("reward_dim"),
    "returns_to_go": _steps("return_dim"),
    "timesteps": lambda sizes: [torch.arange(sizes.tokens).repeat(sizes.batch, 1)],
}
