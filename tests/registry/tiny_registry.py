"""Every model type of transformers' registry, as a tiny model with random weights.

A tiny configuration is the default one of its class, shrunk by the rule of `shrinking.py`, and then by `EXCEPTIONS`.
"""

from collections.abc import Iterator
from typing import Any

import torch
import transformers
from registry_exceptions import EXCEPTIONS
from shrinking import shrink
from torch import nn
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

CLASSES = {  # whose AutoModel takes the configuration of a part
    "musicgen": "MusicgenForConditionalGeneration",
    "musicgen_melody": "MusicgenMelodyForConditionalGeneration",
}
HEADS_OF: dict[str, str] = {  # wholes that have no AutoModel
    "encoder-decoder": "AutoModelForSeq2SeqLM",
    "vision-encoder-decoder": "AutoModelForImageTextToText",
    "speech-encoder-decoder": "AutoModelForSpeechSeq2Seq",
}


def model_types() -> list[str]:
    """Return every model type that AutoModel can build."""
    return sorted(MODEL_MAPPING_NAMES)


def tiny_config(model_type: str) -> PreTrainedConfig:
    """Return the default configuration of a model type, shrunk.

    Raises:
        KeyError: transformers has no such model type.
    """
    config_class = CONFIG_MAPPING[model_type]
    shrunk = shrink(_defaults(config_class))
    for path, value in EXCEPTIONS.get(model_type, {}).items():
        *parts, key = path.split(".")
        place = shrunk
        for part in parts:
            place = place[part]
        place[key] = value
    return config_class.from_dict(shrunk)


def _defaults(config_class: type[PreTrainedConfig]) -> dict[str, Any]:
    """Return the default configuration as nested dicts, with its parts' own `model_type`s."""
    values = config_class().to_dict()
    for key in ("transformers_version", "stage_names", "_out_features", "_out_indices"):
        values.pop(key, None)
    return values


def tiny_model(model_type: str, seed: int = 0, head: str = "AutoModel") -> PreTrainedModel:
    """Return a model of tiny size with random weights, in evaluation mode and float32.

    Weights are larger than transformers initialises them, and nowhere all zeros or ones. So each part of the model
    has an effect on its output, and so have biases, norms and scales of layers.

    Args:
        model_type: One of `model_types()`, or a whole of `HEADS_OF`.
        seed: Of the weights.
        head: The AutoModel class that builds it.
    """
    model_class, config = _model_class(model_type, head), tiny_config(model_type)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = model_class._from_config(config).float().eval()
        for module in model.modules():
            for parameter in module.parameters(recurse=False):
                if parameter.is_floating_point():
                    _enlarge_(parameter, convolution=isinstance(module, nn.modules.conv._ConvNd))
    return model


def _enlarge_(parameter: nn.Parameter, convolution: bool) -> None:
    """Make weights so large that the model's layers keep the size of what they get; move biases, norms and scales."""
    noise = torch.randn(parameter.shape)
    if parameter.dim() < 2:
        parameter.add_(noise, alpha=0.1 * (parameter.dim() > 0))
        return
    inputs = parameter[0].numel() if convolution else parameter.shape[-1]
    spread, wanted = parameter.std(), inputs**-0.5
    if spread < wanted / 10 or not torch.isfinite(spread):  # zeros, or scales
        parameter.copy_(noise * wanted)
    elif spread < wanted:
        parameter.mul_(wanted / spread)


def _model_class(model_type: str, head: str) -> type[PreTrainedModel]:
    """Return the class itself: AutoModel knows some types' configurations by other names."""
    if head == "AutoModel" and model_type in MODEL_MAPPING_NAMES:
        name = CLASSES.get(model_type, MODEL_MAPPING_NAMES[model_type])
        return getattr(transformers, name if isinstance(name, str) else name[0])
    auto = getattr(transformers, HEADS_OF.get(model_type, head))
    return auto._model_mapping[CONFIG_MAPPING[model_type]]


def first_output(model: nn.Module, batch: dict[str, torch.Tensor], seed: int = 0) -> torch.Tensor:
    """Return the first floating-point tensor of a model's output; random numbers that it draws are the same each time.

    Raises:
        ValueError: The output has none.
    """
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        output = model(**batch)
    for tensor in float_tensors(output):
        return tensor
    raise ValueError(f"{type(model).__name__} returned no floating-point tensor, but {type(output).__name__}")


def float_tensors(output: Any) -> Iterator[torch.Tensor]:
    """Yield the floating-point tensors of an output in order, nested ones too."""
    if isinstance(output, torch.Tensor):
        if output.is_floating_point() and output.numel() > 1:
            yield output
    elif isinstance(output, (dict, list, tuple)):
        for part in output.values() if isinstance(output, dict) else output:
            yield from float_tensors(part)
