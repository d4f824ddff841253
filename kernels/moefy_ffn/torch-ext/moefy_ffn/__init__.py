"""The routed FFN as one call: router, selection, and the chosen experts' neurons, nothing else computed.

    y, experts = moe_ffn(x, up, down, k=10, expert_size=32, activation="relu", router=router)

Weights are read where they lie, a row per neuron, so that a model's own parameters serve; see `ffn.cpp`.
"""

import ctypes

import torch

from .build import BuildError, library

__all__ = ["ACTIVATIONS", "BuildError", "moe_ffn"]

ACTIVATIONS = ("relu", "gelu", "gelu_tanh", "silu", "relu_squared")  # in the order of ffn.cpp


class _Ffn(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("router", "up", "gate", "down", "up_bias", "gate_bias", "down_bias")),
        *((name, ctypes.c_int64) for name in ("d", "num_experts", "expert_size", "k")),
        ("activation", ctypes.c_int32),
    ]


def moe_ffn(
    x: torch.Tensor,
    up: torch.Tensor,
    down: torch.Tensor,
    *,
    k: int,
    expert_size: int,
    activation: str,
    router: torch.Tensor | None = None,
    experts: torch.Tensor | None = None,
    gate: torch.Tensor | None = None,
    up_bias: torch.Tensor | None = None,
    gate_bias: torch.Tensor | None = None,
    down_bias: torch.Tensor | None = None,
    threads: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The output of the k selected experts of each token, float32 on a CPU.

    FFN(x) = down^T act(up x + up_bias) + down_bias; gated, down^T (act(gate x + gate_bias) * (up x + up_bias)) +
    down_bias; over the neurons of the selected experts, expert e owning neurons [e * expert_size, (e + 1) *
    expert_size).

    Args:
        x: (..., d).
        up, gate, down: (f, d), a row per neuron, contiguous; `down` is the transposed weight of nn.Linear.
        router: (E, d); the k experts of the largest scores run.
        experts: (..., k) int32, which experts run, where there is no router; each at most once per token.
        threads: by default those of torch.

    Returns:
        the output (..., d), and the experts that ran (..., k) int32.

    Raises:
        BuildError: the kernel cannot be compiled here.
        ValueError: a tensor of another dtype, device, shape or layout, an unknown activation, or k out of range.
    """
    tokens, d, f = x.numel() // x.shape[-1], x.shape[-1], up.shape[0]
    if activation not in ACTIVATIONS:
        raise ValueError(f"unknown activation {activation!r}; choose from {', '.join(ACTIVATIONS)}")
    if f % expert_size or not 0 < k <= f // expert_size:
        raise ValueError(f"k={k} of experts of {expert_size} neurons does not fit {f} neurons")
    if (router is None) == (experts is None):
        raise ValueError("give a router or experts")
    x = x.contiguous()
    shapes = {"x": (x, x.shape), "up": (up, (f, d)), "gate": (gate, (f, d)), "down": (down, (f, d))}
    shapes |= {"router": (router, (f // expert_size, d)), "up_bias": (up_bias, (f,)), "gate_bias": (gate_bias, (f,))}
    shapes |= {"down_bias": (down_bias, (d,))}
    for name, (tensor, shape) in shapes.items():
        if tensor is not None:
            _check(name, tensor, torch.float32, shape)
    if experts is None:
        experts = torch.empty((*x.shape[:-1], k), dtype=torch.int32)
    _check("experts", experts, torch.int32, (*x.shape[:-1], k))
    y = torch.empty_like(x)
    pointers = (None if t is None else t.data_ptr() for t in (router, up, gate, down, up_bias, gate_bias, down_bias))
    ffn = _Ffn(*pointers, d, f // expert_size, expert_size, k, ACTIVATIONS.index(activation))
    if tokens:
        library().moefy_ffn(
            ctypes.byref(ffn),
            *(ctypes.c_void_p(t.data_ptr()) for t in (x, experts, y)),
            ctypes.c_int64(tokens),
            ctypes.c_int32(threads or torch.get_num_threads()),
        )
    return y, experts


def _check(name: str, tensor: torch.Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    if tensor.dtype != dtype or tensor.device.type != "cpu" or tensor.shape != shape or not tensor.is_contiguous():
        layout = "" if tensor.is_contiguous() else "not contiguous "
        raise ValueError(
            f"{name} must be a contiguous {dtype} tensor of shape {tuple(shape)} on the CPU, got a {layout}"
            f"{tensor.dtype} of shape {tuple(tensor.shape)} on {tensor.device}"
        )
