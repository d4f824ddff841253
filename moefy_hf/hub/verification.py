"""Check that a saved checkpoint computes what the model computed, where this package is not installed."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from transformers import PreTrainedModel

from ..errors import UnsupportedModel, VerificationError
from ..loading import load
from ..measure.contexts import evaluating
from ..measure.made_up_inputs import made_up_batch
from .card import auto_class, moefied_config

# norm of the difference over norm of the outputs; other weights, another split or router differ by some tenths
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


def verify(
    folder: str | Path, model: PreTrainedModel | None = None, inputs: Mapping[str, torch.Tensor] | None = None
) -> float:
    """Load a checkpoint in a new Python process that cannot import this package, and compare outputs.

    Args:
        folder: of the checkpoint.
        model: what was saved there; by default the checkpoint as this package loads it.
        inputs: model inputs; by default made up (`made_up_batch`).

    Returns:
        the norm of the difference relative to that of the outputs, the largest over all outputs.

    Raises:
        VerificationError: it does not load as the MoEfied class, or gives other outputs.
        NotMoefied: the folder holds a dense checkpoint.

    Example:
        >>> model.save_pretrained("my-moe")
        >>> verify("my-moe", model)
        0.0
    """
    folder = Path(folder).resolve()
    config = moefied_config(folder)
    model = load(folder, trust_remote_code=True) if model is None else model
    inputs, expected = inputs_and_outputs(model, inputs)
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
        loaded = torch.load(f"{exchange}/outputs.pt")
    if loaded["class"] != config["architectures"][0]:
        raise VerificationError(f"it loads as {loaded['class']}, not as {config['architectures'][0]}")
    difference = max(relative(loaded["outputs"][name], value) for name, value in expected.items())
    if not difference <= TOLERANCE.get(model.dtype, 1e-3):  # nan too
        raise VerificationError(f"a new process gets outputs that differ by {difference:.2g} of their norm")
    return difference


def inputs_and_outputs(
    model: PreTrainedModel, inputs: Mapping[str, torch.Tensor] | None
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Return inputs, made up where none are given, and what the model returns for them.

    Raises:
        VerificationError: none could be made up.
    """
    if inputs is not None:
        return dict(inputs), outputs_of(model, inputs)
    try:
        made_up = made_up_batch(model)
    except UnsupportedModel as error:
        raise VerificationError(f"no inputs could be made up for it: pass inputs= ({error})") from error
    return made_up, outputs_of(model, made_up)


@torch.no_grad()
def outputs_of(model: PreTrainedModel, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return every tensor of a model's output, computed in evaluation mode."""
    with evaluating(model):
        output = model(**{name: value.to(model.device) for name, value in inputs.items()})
    return {name: value.cpu() for name, value in output.items() if torch.is_tensor(value)}


def relative(output: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the norm of the difference relative to the norm of what is expected."""
    return float((output.float() - expected.float()).norm() / expected.float().norm().clamp_min(1e-12))


def last_line(text: str) -> str:
    """Return the last line of a text that is not blank."""
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "no message")
