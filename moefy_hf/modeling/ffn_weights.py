"""What an FFN computes, as plain tensors.

Symbols: d model width, f FFN width (neurons).
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn


@dataclass(frozen=True)
class FfnWeights:
    """The tensors of one FFN, neurons first, as views of the model's parameters: FFN(x) = neurons(x) @ down.T + bias.

    `up` and `gate` are (f, d), `down` is (d, f), biases are (f,); `gate` is None in an ungated FFN.
    """

    up: torch.Tensor
    down: torch.Tensor
    act: nn.Module
    up_bias: torch.Tensor | None = None
    gate: torch.Tensor | None = None
    gate_bias: torch.Tensor | None = None

    @property
    def keys(self) -> torch.Tensor:
        """(f, d): the rows that decide which neurons fire, that is gate rows in a gated FFN, else up rows."""
        return self.up if self.gate is None else self.gate

    def of_neurons(self, neurons: torch.Tensor) -> "FfnWeights":
        """The FFN of some of the neurons (n,), in that order."""

        def taken(rows: torch.Tensor | None) -> torch.Tensor | None:
            return None if rows is None else rows[neurons.to(rows.device)]

        return replace(
            self,
            up=self.up[neurons.to(self.up.device)],
            down=self.down[:, neurons.to(self.down.device)],
            up_bias=taken(self.up_bias),
            gate=taken(self.gate),
            gate_bias=taken(self.gate_bias),
        )

    def neurons(self, x: torch.Tensor) -> torch.Tensor:
        """(..., d) -> (..., f): the activations that `down` multiplies."""
        x = x.to(self.up.dtype)
        a = F.linear(x, self.up, self.up_bias)
        a = self.act(a) if self.gate is None else self.act(F.linear(x, self.gate, self.gate_bias)) * a
        return a.to(self.down.dtype)  # T5 keeps `wo` in float32 in a half-precision model
