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


def largest_share(x: torch.Tensor, expert_size: int) -> float:
    """The share of the experts above which "auto" computes all of them for tokens x (..., d).

    On CPUs, measured with one thread of a Zen 5 (AVX-512, AVX512_BF16), times F.linear, the router left out: one
    token, which is bound by memory, 1.7 to 2.3 at a share of 0.95, experts as small as single neurons; 2 to 16 tokens
    at 0.8 and experts of 8 or more 1.1 to 2.3; 128 tokens at 0.5 and experts of 32 3.0 in float32, 1.2 in bfloat16
    (of a Zen 4 1.6 and 1.1, with AVX2 alone less). Rows of fine experts are multiplied by few tokens at a time: at
    0.3, 128 tokens, experts of 4 and 1 neurons come to 2.8 and 1.06 in float32, 0.7 and 0.26 in bfloat16. Where a
    processor has AMX, dense bfloat16 runs on it and the kernel does not: many tokens are left to dense there. GPUs
    are not measured.
    """
    if x.device.type != "cpu":
        return 0.5
    tokens = x.numel() // x.shape[-1]
    if tokens <= 1:
        return 1.0
    fine = expert_size / (16 if x.dtype == torch.bfloat16 else 4)
    if tokens <= 16:
        return 0.8 * min(1.0, fine)
    on_amx = x.dtype == torch.bfloat16 and torch.cpu._is_amx_tile_supported()
    return 0.0 if on_amx else 0.5 * min(1.0, fine)
