"""Tiny models that consist of several, with random weights, and batches that reach each of their towers."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1] / "registry"))

from shrinking import IMAGE  # noqa: E402
from tiny_registry import tiny_model  # noqa: E402

TEXT = 6  # tokens of a text beside its image


@dataclass(frozen=True)
class Composite:
    """A model, where its towers' FFNs are (* for numbers of layers), and what it runs on.

    Attributes:
        head: name of its Auto class.
        towers: name -> names of the FFNs' modules; those of "text" are converted by default, or all where it has none.
        batch: makes inputs of a model.
    """

    head: str
    towers: dict[str, list[str]]
    batch: Callable[[nn.Module], dict[str, torch.Tensor]]


def texts(model: nn.Module, special: int | None = None, times: int = 0) -> dict[str, torch.Tensor]:
    """Two texts that begin with a special token, several times; the second is padded on the left."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, 90, (2, times + TEXT), generator=generator)
    mask = torch.ones_like(ids)
    if special is not None:
        ids[:, :times] = special
    else:
        mask[1, :2] = 0
    return {"input_ids": ids, "attention_mask": mask}


def images(channels: int = 3) -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(2, channels, IMAGE, IMAGE, generator=torch.Generator().manual_seed(2))}


def with_types(batch: dict[str, torch.Tensor], name: str, special: int) -> dict[str, torch.Tensor]:
    return {**batch, name: (batch["input_ids"] == special).long()}


def gemma_batch(model: nn.Module) -> dict[str, torch.Tensor]:
    special = model.config.image_token_id
    return images() | with_types(texts(model, special, model.config.mm_tokens_per_image), "token_type_ids", special)


def llava_batch(model: nn.Module) -> dict[str, torch.Tensor]:
    patches = (IMAGE // model.config.vision_config.patch_size) ** 2
    return images() | texts(model, model.config.image_token_id, patches)


def qwen_batch(model: nn.Module) -> dict[str, torch.Tensor]:
    vision, special = model.config.vision_config, model.config.image_token_id
    values = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    patches = torch.randn(2 * 16, values, generator=torch.Generator().manual_seed(2))
    text = with_types(texts(model, special, 16 // vision.spatial_merge_size**2), "mm_token_type_ids", special)
    return {"pixel_values": patches, "image_grid_thw": torch.tensor([[1, 4, 4]] * 2), **text}


def decoder_texts() -> dict[str, torch.Tensor]:
    return {"decoder_input_ids": torch.randint(5, 90, (2, 5), generator=torch.Generator().manual_seed(3))}


VISION_OF_CLIP, TEXT_OF_CLIP = ["vision_model.encoder.layers.*.mlp"], ["text_model.encoder.layers.*.mlp"]
BOTH = {"text": TEXT_OF_CLIP, "vision": VISION_OF_CLIP}
LANGUAGE = ["model.language_model.layers.*.mlp"]
COMPOSITES = {
    "gemma3": Composite(
        "AutoModelForImageTextToText",
        {"text": LANGUAGE, "vision": ["model.vision_tower.encoder.layers.*.mlp"]},
        gemma_batch,
    ),
    "llava": Composite(
        "AutoModelForImageTextToText",
        {"text": LANGUAGE, "vision": ["model.vision_tower.encoder.layers.*.mlp"]},
        llava_batch,
    ),
    "qwen2_5_vl": Composite(
        "AutoModelForImageTextToText", {"text": LANGUAGE, "vision": ["model.visual.blocks.*.mlp"]}, qwen_batch
    ),
    "clip": Composite("AutoModel", BOTH, lambda model: images() | texts(model)),
    "siglip": Composite("AutoModel", BOTH, lambda model: images() | texts(model)),
    "clip_text_model": Composite("AutoModel", {"": ["encoder.layers.*.mlp"]}, texts),
    "clip_vision_model": Composite("AutoModel", {"": ["encoder.layers.*.mlp"]}, lambda model: images()),
    "siglip_vision_model": Composite("AutoModel", {"": ["encoder.layers.*.mlp"]}, lambda model: images()),
    "encoder-decoder": Composite(
        "AutoModelForSeq2SeqLM",
        {"text": ["encoder.encoder.layer.*", "decoder.bert.encoder.layer.*"]},
        lambda model: texts(model) | decoder_texts(),
    ),
    "vision-encoder-decoder": Composite(
        "AutoModelForImageTextToText",
        {"text": ["decoder.bert.encoder.layer.*"], "vision": ["encoder.layers.*.mlp"]},
        lambda model: images() | decoder_texts(),
    ),
    "speech-encoder-decoder": Composite(
        "AutoModelForSpeechSeq2Seq",
        {"text": ["decoder.bert.encoder.layer.*"], "audio": ["encoder.encoder.layers.*.feed_forward"]},
        lambda model: (
            {"input_values": torch.randn(2, 4000, generator=torch.Generator().manual_seed(2))} | decoder_texts()
        ),
    ),
}


def composite(name: str) -> nn.Module:
    """A tiny model with random weights; one of two models can generate."""
    model = tiny_model(name, head=COMPOSITES[name].head)
    if name.endswith("encoder-decoder"):
        for config in (model.config, model.generation_config):
            config.decoder_start_token_id, config.pad_token_id = 1, 0
    return model
