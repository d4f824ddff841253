"""The routed FFN as one call: router, selection, and the chosen experts' neurons, nothing else computed.

    y, experts = moe_ffn(x, up, down, k=10, expert_size=32, activation="relu", router=router)

Weights are read where they lie, a row per neuron, so that a model's own parameters serve; see `ffn.cpp`.
"""

import ctypes

import torch

from .build import BuildError, library

__all__ = ["ACTIVATIONS", "BuildError", "MoeFfn", "moe_ffn"]

ACTIVATIONS = ("relu", "gelu", "gelu_tanh", "silu", "relu_squared")  # in the order of ffn.cpp


class _Ffn(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("router", "up", "gate", "down", "up_bias", "gate_bias", "down_bias")),
        *((name, ctypes.c_int64) for name in ("d", "num_experts", "expert_size", "k")),
        ("activation", ctypes.c_int32),
    ]


class MoeFfn:
    """A routed FFN's weights, checked once: calling it with x (..., d) float32 gives the output (..., d) of the k
    selected experts of each token, and which ran (..., k) int32.

    FFN(x) = down^T act(up x + up_bias) + down_bias; gated, down^T (act(gate x + gate_bias) * (up x + up_bias)) +
    down_bias; over the neurons of the selected experts, expert e owning neurons [e * expert_size, (e + 1) *
    expert_size).

    Args:
        up, gate, down: (f, d), a row per neuron, contiguous float32 on the CPU; `down` is transposed nn.Linear's.
            They are read where they are: a change in place is seen.
        router: (E, d); the k experts of the largest scores run. Without, calls say which.
        threads: of a call; by default those of torch.

    Raises:
        BuildError: the kernel cannot be compiled here.
        ValueError: a tensor of another dtype, device, shape or layout, an unknown activation, or k out of range.
    """

    def __init__(
        self,
        up: torch.Tensor,
        down: torch.Tensor,
        *,
        k: int,
        expert_size: int,
        activation: str,
        router: torch.Tensor | None = None,
        gate: torch.Tensor | None = None,
        up_bias: torch.Tensor | None = None,
        gate_bias: torch.Tensor | None = None,
        down_bias: torch.Tensor | None = None,
        threads: int | None = None,
    ):
        f, d = up.shape
        if activation not in ACTIVATIONS:
            raise ValueError(f"unknown activation {activation!r}; choose from {', '.join(ACTIVATIONS)}")
        if f % expert_size or not 0 < k <= f // expert_size:
            raise ValueError(f"k={k} of experts of {expert_size} neurons does not fit {f} neurons")
        shapes = {"up": (up, (f, d)), "gate": (gate, (f, d)), "down": (down, (f, d)), "down_bias": (down_bias, (d,))}
        shapes |= {"router": (router, (f // expert_size, d)), "up_bias": (up_bias, (f,))}
        shapes |= {"gate_bias": (gate_bias, (f,))}
        for name, (tensor, shape) in shapes.items():
            if tensor is not None:
                _check(name, tensor, torch.float32, shape)
        self.d, self.k, self.routed, self.threads = d, k, router is not None, threads
        self.kept = (router, up, gate, down, up_bias, gate_bias, down_bias)
        pointers = (None if tensor is None else tensor.data_ptr() for tensor in self.kept)
        self.struct = _Ffn(*pointers, d, f // expert_size, expert_size, k, ACTIVATIONS.index(activation))
        self.pointer = ctypes.byref(self.struct)
        self.run = library().moefy_ffn
        self.run.argtypes = (*[ctypes.c_void_p] * 4, ctypes.c_int64, ctypes.c_int32)

    def __call__(self, x: torch.Tensor, experts: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """experts: (..., k) int32, each at most once per token, where there is no router.

        Raises:
            ValueError: x or experts of another dtype, device or shape; experts and a router, or neither.
        """
        if self.routed == (experts is not None):
            raise ValueError("give a router or experts")
        x = x.contiguous()
        _check("x", x, torch.float32, (*x.shape[:-1], self.d))
        if experts is None:
            experts = torch.empty((*x.shape[:-1], self.k), dtype=torch.int32)
        else:
            _check("experts", experts, torch.int32, (*x.shape[:-1], self.k))
        y, tokens = torch.empty_like(x), x.numel() // self.d
        if tokens:
            threads = self.threads or torch.get_num_threads()
            self.run(self.pointer, x.data_ptr(), experts.data_ptr(), y.data_ptr(), tokens, threads)
        return y, experts


def moe_ffn(
    x: torch.Tensor, up: torch.Tensor, down: torch.Tensor, *, experts: torch.Tensor | None = None, **settings
) -> tuple[torch.Tensor, torch.Tensor]:
    """One call of `MoeFfn(up, down, **settings)`, which is worth keeping for more of them."""
    return MoeFfn(up, down, **settings)(x, experts)


def _check(name: str, tensor: torch.Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    if tensor.dtype != dtype or tensor.device.type != "cpu" or tensor.shape != shape or not tensor.is_contiguous():
        layout = "" if tensor.is_contiguous() else "not contiguous "
        raise ValueError(
            f"{name} must be a contiguous {dtype} tensor of shape {tuple(shape)} on the CPU, got a {layout}"
            f"{tensor.dtype} of shape {tuple(tensor.shape)} on {tensor.device}"
        )
