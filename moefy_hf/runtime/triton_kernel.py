"""Backend "triton": the Triton kernels, on GPUs and with gradients."""

import importlib.util
import os

import torch

from ..modeling.routed_activation import RoutedActivation
from ..modeling.routers import handed_scores
from .backend_base import Backend

TRITON_EXTRA = "pip install 'moefy-hf[triton]'"


class TritonKernel(Backend):
    """The Triton kernels; in Triton's interpreter (TRITON_INTERPRET=1) they run on the CPU."""

    name = "triton"
    device = "cuda"
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    gradients = True
    autocast = True
    compensation = False
    counts_experts = False  # the host would wait for the device

    @classmethod
    def installed(cls) -> bool:
        """Whether Triton is, which comes with an extra."""
        return importlib.util.find_spec("triton") is not None

    @classmethod
    def require(cls) -> None:
        if not cls.installed():
            raise ImportError(f"implementation 'triton' needs Triton: {TRITON_EXTRA}")

    @classmethod
    def unavailable(cls) -> str | None:
        if not cls.installed():
            return f"there is no Triton: {TRITON_EXTRA}"
        return None if torch.cuda.is_available() else "there is no GPU"

    @classmethod
    def device_type(cls) -> str:
        return "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else cls.device

    @classmethod
    def largest_share(cls, x: torch.Tensor, expert_size: int) -> float:
        return 0.5  # not measured

    def compute(self, x: torch.Tensor, most: float | None) -> torch.Tensor | None:
        from moefy_ffn.triton_ffn import triton_moe_ffn  # Triton comes with an extra

        weights, act, device = self.site.weights(), self.act, x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weights.up.dtype

        def cast(tensor: torch.Tensor | None) -> torch.Tensor | None:
            return None if tensor is None else tensor.to(dtype)

        return triton_moe_ffn(
            x.to(dtype),
            weights.up.to(dtype),
            weights.down.t().to(dtype),
            selected_experts(act, x),
            expert_size=act.expert_size,
            activation=self.activation,
            gate=cast(weights.gate),
            up_bias=cast(weights.up_bias),
            gate_bias=cast(weights.gate_bias),
            down_bias=cast(self.site.down.bias),
        )


def selected_experts(act: RoutedActivation, x: torch.Tensor) -> torch.Tensor:
    """x (..., d) -> (..., K) int32: the experts that run, the shared ones first, -1 in unused slots."""
    scores = handed_scores(act.router, x.detach())
    index, used = act.selection(act.router.strengths(scores) if act.selection.dynamic else scores)
    shared = torch.arange(act.shared, device=x.device).expand(*index.shape[:-1], -1)
    return torch.cat([shared, (index + act.shared).where(used, -1)], -1).int()
