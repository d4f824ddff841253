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
    compensation: bool = True
    device: str = "cpu"

    @property
    def names(self) -> str:
        return " or ".join(str(dtype).removeprefix("torch.") for dtype in self.dtypes)


LIMITS = {
    "torch": Limits((torch.float32, torch.bfloat16)),
    "cpu": Limits((torch.float32, torch.bfloat16)),
    "triton": Limits(
        (torch.float32, torch.bfloat16, torch.float16),
        gradients=True,
        autocast=True,
        compensation=False,
        device="cuda",
    ),
}
INNER_DROPOUT = {  # model_type -> where an FFN keeps the dropout of its neurons, between activation and `down`
    **dict.fromkeys(["t5", "mt5", "umt5"], "dropout"),
    **dict.fromkeys(["bart", "mbart", "pegasus", "marian", "whisper"], "activation_dropout"),
    "modernbert": "drop",
}


def device_of(name: str) -> str:
    """The type of device that an implementation runs on."""
    return "cpu" if name == "triton" and os.environ.get("TRITON_INTERPRET") == "1" else LIMITS[name].device


def largest_share(x: torch.Tensor) -> float:
    """The share of the experts above which "auto" computes all of them for tokens x (..., d).

    Measured with one thread of a Zen 4 (AVX-512, AVX512_BF16), times F.linear, router included, experts of 32: 1 to 16
    tokens, which are bound by memory, 1.25 to 2.5 at a share of 0.9; 128 and 512 tokens in float32 1.6 to 1.7 at 0.5,
    1.06 to 1.2 at 0.75 (with AVX2 alone 0.7 to 0.9); in bfloat16 1.08 to 1.4 at 0.5, 0.83 to 0.88 at 0.75. Where a
    processor has AMX, dense bfloat16 runs on it and the kernel does not: many tokens are left to dense there. GPUs are
    not measured.
    """
    if x.device.type == "cpu" and x.numel() <= 16 * x.shape[-1]:
        return 0.8
    on_amx = x.device.type == "cpu" and x.dtype == torch.bfloat16 and torch.cpu._is_amx_tile_supported()
    return 0.0 if on_amx else 0.5
