"""Implementations of a sparse FFN: how the selected experts alone are computed for tokens x."""

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F

from ..modeling.routed_activation import RoutedActivation
from ..modeling.routers import facts_of
from .limits import largest_share

if TYPE_CHECKING:
    from .execution import SparseFfn

ACTIVATIONS = {  # class of the activation module -> the kernel's name
    "ReLU": "relu",
    "GELUActivation": "gelu",
    "NewGELUActivation": "gelu_tanh",
    "GELUTanh": "gelu_tanh",
    "SiLUActivation": "silu",
    "SiLU": "silu",
    "ReLUSquaredActivation": "relu_squared",
    "QuickGELUActivation": "quick_gelu",
}


class KernelRouter(NamedTuple):
    """A router that the kernel runs by itself: its scores are weight x, or weight before x."""

    weight: str
    before: str | None = None
    strengths: str = "softmax"


KERNEL_ROUTERS = {
    "LinearRouter": KernelRouter("weight"),
    "LowRankRouter": KernelRouter("proj_out", before="proj_in"),
    "MeanGateRouter": KernelRouter("weight"),
    "PriorApproximateRouter": KernelRouter("weight"),
    "RandomRouter": KernelRouter("weight"),
    "SigmoidRouter": KernelRouter("weight", strengths="sigmoid"),
    "SimilarityRouter": KernelRouter("centres"),
}
KERNEL_SELECTIONS = {"TopK": "top_k", "Threshold": "threshold", "TopP": "top_p", "Level": "level"}  # class -> its name


def run_kernel(ffn: "SparseFfn", x: torch.Tensor) -> torch.Tensor | None:
    """x (..., d) -> (..., d), by the C++ kernel; None where "auto" does better with all experts."""
    kernel = ffn.kernel()
    if kernel.routed and ffn.auto and ffn.act.selection.dynamic:
        # How many experts these tokens need is known only when they are routed: an average that was measured on others
        # would be no promise. The kernel counts them before any runs, and stops at too many: dense after its routing
        return kernel.within(x, largest_share(ffn.name, x, ffn.act.expert_size))
    if kernel.routed:
        return kernel(x)[0]
    keep = ffn.keep(x)  # (..., E)
    return kernel(x, torch.arange(keep.shape[-1], dtype=torch.int32).where(keep, -1))[0]


def run_torch(ffn: "SparseFfn", x: torch.Tensor) -> torch.Tensor:
    """x (..., d) -> (..., d), by indexing the selected experts' rows, token by token."""
    weights, down_bias, act = ffn.site.weights(), ffn.site.down.bias, ffn.site.act
    tokens, keep = x.reshape(-1, x.shape[-1]), ffn.keep(x).flatten(0, -2)  # (T, d), (T, E)

    def rows(matrix: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        """(f, ...) -> (K * m, ...)"""
        return matrix.unflatten(0, (act.num_experts, -1))[chosen].flatten(0, 1)

    def linear(token: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, chosen: torch.Tensor):
        return F.linear(token, rows(weight, chosen), None if bias is None else rows(bias, chosen))

    outputs = []
    for token, kept in zip(tokens, keep, strict=True):
        chosen = kept.nonzero().squeeze(-1)  # (K,)
        hidden = linear(token, weights.up, weights.up_bias, chosen)
        if weights.gate is None:
            hidden = weights.act(hidden)
        else:
            hidden = weights.act(linear(token, weights.gate, weights.gate_bias, chosen)) * hidden
        outputs.append(hidden @ rows(weights.down.t(), chosen))
    y = torch.stack(outputs) if outputs else tokens
    if act.compensation is not None:
        y = y + (~keep).to(y.dtype) @ ffn.means()
    return (y if down_bias is None else y + down_bias).view_as(x)


def experts_of(act: RoutedActivation, x: torch.Tensor) -> torch.Tensor:
    """x (..., d) -> (..., K) int32: the experts that run, the shared ones first, -1 in unused slots."""
    scores = act.router(x.detach())
    facts_of(act.router).hand_on(act.router, scores)  # older code that came with a checkpoint has no such method
    index, used = act.selection(act.router.strengths(scores) if act.selection.dynamic else scores)
    shared = torch.arange(act.shared, device=x.device).expand(*index.shape[:-1], -1)
    return torch.cat([shared, (index + act.shared).where(used, -1)], -1).int()


def run_triton(ffn: "SparseFfn", x: torch.Tensor) -> torch.Tensor:
    """x (..., d) -> (..., d), by the Triton kernels; with gradients."""
    from moefy_ffn.triton_ffn import triton_moe_ffn  # Triton comes with an extra

    weights, act, device = ffn.site.weights(), ffn.site.act, x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weights.up.dtype

    def cast(tensor: torch.Tensor | None) -> torch.Tensor | None:
        return None if tensor is None else tensor.to(dtype)

    return triton_moe_ffn(
        x.to(dtype),
        weights.up.to(dtype),
        weights.down.t().to(dtype),
        experts_of(act, x),
        expert_size=act.expert_size,
        activation=ACTIVATIONS[type(weights.act).__name__],
        gate=cast(weights.gate),
        up_bias=cast(weights.up_bias),
        gate_bias=cast(weights.gate_bias),
        down_bias=cast(ffn.site.down.bias),
    )


IMPLEMENTATIONS: dict[str, Callable] = {"torch": run_torch, "cpu": run_kernel, "triton": run_triton}  # beside "masked"
