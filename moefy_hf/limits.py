"""What the implementations of a sparse FFN can run (`execution.py`)."""

import os
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Limits:
    """What an implementation can run."""

    dtypes: tuple[torch.dtype, ...] = (torch.float32,)
    gradients: bool = False
    autocast: bool = False
    device: str = "cpu"

    @property
    def names(self) -> str:
        return " or ".join(str(dtype).removeprefix("torch.") for dtype in self.dtypes)


LIMITS = {
    "torch": Limits(),
    "cpu": Limits(),
    "triton": Limits((torch.float32, torch.bfloat16, torch.float16), gradients=True, autocast=True, device="cuda"),
}
INNER_DROPOUT = {  # model_type -> where an FFN keeps the dropout of its neurons, between activation and `down`
    **dict.fromkeys(["t5", "mt5", "umt5"], "dropout"),
    **dict.fromkeys(["bart", "mbart", "pegasus", "marian", "whisper"], "activation_dropout"),
    "modernbert": "drop",
}


def device_of(name: str) -> str:
    """The type of device that an implementation runs on."""
    return "cpu" if name == "triton" and os.environ.get("TRITON_INTERPRET") == "1" else LIMITS[name].device
