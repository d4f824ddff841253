"""Backend "torch": index the selected experts' rows, token by token. It needs no compiler, and pays for few tokens."""

import torch
import torch.nn.functional as F

from .backend_base import Backend, expert_means

FEW_TOKENS = 4  # that indexing rows with torch pays for


class TorchRows(Backend):
    """Plain torch: for each token, matrices of the rows of its experts."""

    name = "torch"
    most_tokens = FEW_TOKENS

    @classmethod
    def largest_share(cls, x: torch.Tensor, expert_size: int) -> float:
        return 0.8

    def compute(self, x: torch.Tensor, most: float | None) -> torch.Tensor | None:
        weights, down_bias, act = self.site.weights(), self.site.down.bias, self.act
        tokens, expert_mask = x.reshape(-1, x.shape[-1]), act.keep(x).flatten(0, -2)  # (T, d), (T, E)
        if most is not None and float(expert_mask.float().mean()) > most:
            return None

        def rows(matrix: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
            """(f, ...) -> (K * m, ...)"""
            return matrix.unflatten(0, (act.num_experts, -1))[experts].flatten(0, 1)

        def linear(token: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, experts: torch.Tensor):
            return F.linear(token, rows(weight, experts), None if bias is None else rows(bias, experts))

        outputs = []
        for token, mask in zip(tokens, expert_mask, strict=True):
            experts = mask.nonzero().squeeze(-1)  # (K,)
            hidden = linear(token, weights.up, weights.up_bias, experts)
            if weights.gate is None:
                hidden = weights.act(hidden)
            else:
                hidden = weights.act(linear(token, weights.gate, weights.gate_bias, experts)) * hidden
            outputs.append(hidden @ rows(weights.down.t(), experts))
        y = torch.stack(outputs) if outputs else tokens
        if act.compensation is not None:
            y = y + (~expert_mask).to(y.dtype) @ expert_means(self.site)
        return (y if down_bias is None else y + down_bias).view_as(x)
