"""Does a saved checkpoint give, where this package is not installed, what the model gave?"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ..loading import load_checkpoint
from ..measure.contexts import evaluating
from .card import auto_class, moefied_config

# norm of the difference over norm of the outputs: another dense, split or router gives some tenths
TOLERANCE = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 2e-2}

ELSEWHERE = """
import sys

sys.modules["moefy_hf"] = None  # importing it fails
import torch
import transformers

folder, head, exchange, device = sys.argv[1:]
model = getattr(transformers, head).from_pretrained(folder, trust_remote_code=True).eval().to(device)
inputs = {name: value.to(device) for name, value in torch.load(f"{exchange}/inputs.pt").items()}
with torch.no_grad():
    output = model(**inputs)
tensors = {name: value.cpu() for name, value in output.items() if torch.is_tensor(value)}
torch.save({"class": type(model).__name__, "outputs": tensors}, f"{exchange}/outputs.pt")
"""


class VerificationError(RuntimeError):
    """What differs between a model and its saved self."""


def verify(
    folder: str | Path, model: PreTrainedModel | None = None, inputs: Mapping[str, torch.Tensor] | None = None
) -> float:
    """Load a checkpoint in a new Python process that cannot import this package, and compare outputs.

    Args:
        model: what was saved there; by default the checkpoint as this package loads it.
        inputs: model inputs; by default made up from the config.

    Returns:
        the norm of the difference relative to that of the outputs, the largest over all outputs.

    Raises:
        VerificationError: it does not load as the MoEfied class, or gives something else.
    """
    folder = Path(folder).resolve()
    config = moefied_config(folder)
    model = load_checkpoint(folder) if model is None else model
    made_up = inputs is None
    inputs = example_inputs(model) if inputs is None else dict(inputs)
    try:
        expected = outputs_of(model, inputs)
    except Exception as error:
        if made_up:
            raise VerificationError(f"the inputs made up for it do not suit it: pass inputs= ({error})") from error
        raise
    with tempfile.TemporaryDirectory() as exchange:
        torch.save(inputs, f"{exchange}/inputs.pt")
        done = subprocess.run(
            [sys.executable, "-c", ELSEWHERE, str(folder), auto_class(config), exchange, str(model.device)],
            capture_output=True,
            text=True,
            cwd=exchange,
            env=os.environ | {"HF_MODULES_CACHE": exchange, "HF_HUB_OFFLINE": "1"},  # nothing but the folder's files
        )
        if done.returncode:
            raise VerificationError(f"it does not load in a new process: {last_line(done.stderr)}")
        found = torch.load(f"{exchange}/outputs.pt")
    if found["class"] != config["architectures"][0]:
        raise VerificationError(f"it loads as {found['class']}, not as {config['architectures'][0]}")
    difference = max(relative(found["outputs"][name], value) for name, value in expected.items())
    if not difference <= TOLERANCE.get(model.dtype, 1e-3):  # nan too
        raise VerificationError(f"a new process gets outputs that differ by {difference:.2g} of their norm")
    return difference


@torch.no_grad()
def outputs_of(model: PreTrainedModel, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Every tensor a model returns, as it evaluates."""
    with evaluating(model):
        output = model(**{name: value.to(model.device) for name, value in inputs.items()})
    return {name: value.cpu() for name, value in output.items() if torch.is_tensor(value)}


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.float() - expected.float()).norm() / expected.float().norm().clamp_min(1e-12))


def last_line(text: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "no message")


def example_inputs(model: PreTrainedModel, batch: int = 2, length: int = 16) -> dict[str, torch.Tensor]:
    """Made-up inputs (seeded) of the kinds that a model takes: tokens, pictures or sound features."""
    config, head = model.config, type(model).__name__
    generator = torch.Generator().manual_seed(0)
    batch = 1 if getattr(config, "pad_token_id", None) is None else batch  # classifiers look for the last real token

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    def tokens(part: Any) -> torch.Tensor:
        longest = min(length, getattr(part, "max_position_embeddings", None) or length)
        shape = (batch, 3, longest) if head.endswith("ForMultipleChoice") else (batch, longest)
        found = torch.randint(part.vocab_size // 2, part.vocab_size, shape, generator=generator)
        if isinstance(part.eos_token_id, int):  # where BART and T5 classify
            found = found.where(found != part.eos_token_id, part.vocab_size // 2 - 1)
            found[..., -1] = part.eos_token_id
        return found

    def picture(part: Any) -> torch.Tensor:
        size = part.image_size if isinstance(part.image_size, list | tuple) else [part.image_size] * 2
        return noise(batch, part.num_channels, *size)

    if config.model_type == "clip":
        pictures = {"pixel_values": picture(config.vision_config)}
        return (
            pictures
            if head.endswith("ForImageClassification")
            else {"input_ids": tokens(config.text_config), **pictures}
        )
    if hasattr(config, "image_size"):
        return {"pixel_values": picture(config)}
    if model.main_input_name == "input_features":
        found = {"input_features": noise(batch, config.num_mel_bins, 2 * config.max_source_positions)}
        return found if head.endswith("AudioClassification") else found | {"decoder_input_ids": tokens(config)}
    found = {"input_ids": tokens(config)}
    decodes = config.is_encoder_decoder and not head.endswith(("Classification", "QuestionAnswering", "EncoderModel"))
    return found | ({"decoder_input_ids": tokens(config)} if decodes and not head.endswith("CausalLM") else {})
