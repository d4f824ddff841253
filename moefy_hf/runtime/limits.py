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


def largest_share(name: str, x: torch.Tensor, expert_size: int) -> float:
    """The share of the experts above which "auto" computes all of them, instead of running implementation `name`, for
    tokens x (..., d).

    "cpu" was measured with one thread of a Zen 5 (AVX-512, AVX512_BF16), times F.linear, the router left out: one
    token, which is bound by memory, 1.7 to 2.3 at a share of 0.95, experts as small as single neurons; 2 to 16 tokens
    at 0.8 and experts of 8 or more 1.1 to 2.3; 128 tokens at 0.5 and experts of 32 3.0 in float32, 1.2 in bfloat16
    (of a Zen 4 1.6 and 1.1, with AVX2 alone less). Rows of fine experts are multiplied by few tokens at a time: at
    0.8, 16 tokens, experts of 4 and 1 neurons come to 1.4 and 0.6 in float32, 0.8 and 0.3 in bfloat16; at 0.3, 128
    tokens, to 2.8 and 1.06, 0.7 and 0.26; at 0.2, single neurons to 1.7 in float32. Where a processor has AMX, dense
    bfloat16 runs on it and the kernel does not: many tokens are left to dense there. "torch" is for few tokens anyway.
    GPUs are not measured.
    """
    if name != "cpu":
        return 0.8 if name == "torch" else 0.5
    tokens, narrow = x.numel() // x.shape[-1], x.dtype == torch.bfloat16
    if tokens <= 1:
        return 1.0
    if tokens <= 16:
        return 0.8 * min(1.0, expert_size / (8 if narrow else 2))
    on_amx = narrow and torch.cpu._is_amx_tile_supported()
    return 0.0 if on_amx else 0.5 * min(1.0, expert_size / (16 if narrow else 2))
