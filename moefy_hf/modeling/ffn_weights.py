"""What an FFN computes, as plain tensors.

Symbols: d model width, f FFN width (neurons).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .offload import held


@dataclass(frozen=True)
class FfnWeights:
    """The tensors of one FFN, neurons first, as views of the model's parameters: FFN(x) = neurons(x) @ down.T + bias.

    `up` and `gate` are (f, d), `down` is (d, f), biases are (f,); `gate` is None in an ungated FFN. `norm` is applied
    to the activations where an architecture does so.
    """

    up: torch.Tensor
    down: torch.Tensor
    act: nn.Module
    up_bias: torch.Tensor | None = None
    gate: torch.Tensor | None = None
    gate_bias: torch.Tensor | None = None
    norm: nn.Module | None = None

    @property
    def keys(self) -> torch.Tensor:
        """(f, d): the rows that decide which neurons fire, that is gate rows in a gated FFN, else up rows."""
        return self.up if self.gate is None else self.gate

    def of_neurons(self, neurons: torch.Tensor) -> "FfnWeights":
        """The FFN of some of the neurons (n,), in that order; a norm, which takes all of them, leaves its scale."""

        def taken(rows: torch.Tensor | None) -> torch.Tensor | None:
            return None if rows is None else rows[neurons.to(rows.device)]

        scale: Any = 1 if self.norm is None else held(self.norm, "weight")
        return replace(
            self,
            up=self.up[neurons.to(self.up.device)],
            down=(self.down * scale)[:, neurons.to(self.down.device)],
            up_bias=taken(self.up_bias),
            gate=taken(self.gate),
            gate_bias=taken(self.gate_bias),
            norm=None,
        )

    def neurons(self, x: torch.Tensor) -> torch.Tensor:
        """(..., d) -> (..., f): the activations that `down` multiplies."""
        x = x.to(self.up.dtype)
        a = F.linear(x, self.up, self.up_bias)
        a = self.act(a) if self.gate is None else self.act(F.linear(x, self.gate, self.gate_bias)) * a
        if self.norm is not None:
            a = self.norm(a)
        return a.to(self.down.dtype)  # T5 keeps `wo` in float32 in a half-precision model


class ChangedActivation(nn.Module):
    """An activation of what a function makes of its input.

    Args:
        before: the function, of all neurons (..., f) of a token.
        act: the activation.
    """

    def __init__(self, before: Callable[[torch.Tensor], torch.Tensor], act: nn.Module):
        super().__init__()
        self.before, self.act = before, act

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        return self.act(self.before(h))
