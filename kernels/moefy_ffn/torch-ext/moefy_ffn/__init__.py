"""The routed FFN as one call: router, selection, and the chosen experts' neurons, nothing else computed.

    y, experts = moe_ffn(x, up, down, k=10, expert_size=32, activation="relu", router=router)

Weights are read where they lie, a row per neuron, so that a model's own parameters serve; see `ffn.cpp`.
"""

import ctypes

import torch

from .build import BuildError, library

__all__ = ["ACTIVATIONS", "BuildError", "MoeFfn", "moe_ffn"]

ACTIVATIONS = ("relu", "gelu", "gelu_tanh", "silu", "relu_squared", "quick_gelu")  # in the order of activations.h


class _Ffn(ctypes.Structure):
    _fields_ = [
        *(
            (name, ctypes.c_void_p)
            for name in ("router", "up", "gate", "down", "up_bias", "gate_bias", "base", "means")
        ),
        *((name, ctypes.c_int64) for name in ("d", "num_experts", "expert_size", "shared")),
        *((name, ctypes.c_int32) for name in ("activation", "is_bfloat16", "router_is_bfloat16")),
    ]


class MoeFfn:
    """A routed FFN's weights, checked once: calling it with x (..., d) gives the output (..., d) of the k selected
    experts of each token, and which ran (..., k) int32.

    FFN(x) = down^T act(up x + up_bias) + down_bias; gated, down^T (act(gate x + gate_bias) * (up x + up_bias)) +
    down_bias; over the neurons of the selected experts, expert e owning neurons [e * expert_size, (e + 1) *
    expert_size). Everything is float32, or everything bfloat16, whose sums are float32.

    Args:
        up, gate, down: (f, d), a row per neuron, contiguous on the CPU; `down` is transposed nn.Linear's. They are
            read where they are: a change in place is seen.
        router: (E - shared, d); the k experts of the largest scores run. Without, calls say which. It may be float32
            in a bfloat16 FFN.
        shared: experts 0 to shared - 1 run for every token; k counts them.
        means: (E, d) what each expert adds to the output of a token that does not run it; copied.
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
        k: int | None = None,
        expert_size: int,
        activation: str,
        router: torch.Tensor | None = None,
        shared: int = 0,
        gate: torch.Tensor | None = None,
        up_bias: torch.Tensor | None = None,
        gate_bias: torch.Tensor | None = None,
        down_bias: torch.Tensor | None = None,
        means: torch.Tensor | None = None,
        threads: int | None = None,
    ):
        f, d = up.shape
        if up.dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"up must be torch.float32 or torch.bfloat16, got {up.dtype}")
        if activation not in ACTIVATIONS:
            raise ValueError(f"unknown activation {activation!r}; choose from {', '.join(ACTIVATIONS)}")
        experts = f // expert_size
        if f % expert_size or (router is not None and (k is None or not 0 <= shared <= k <= experts or k == 0)):
            sizes = f"{f} neurons and {shared} shared experts"
            raise ValueError(f"k={k} of experts of {expert_size} neurons does not fit {sizes}")
        shapes = {"up": (up, (f, d)), "gate": (gate, (f, d)), "down": (down, (f, d)), "down_bias": (down_bias, (d,))}
        shapes |= {"up_bias": (up_bias, (f,)), "gate_bias": (gate_bias, (f,)), "means": (means, (experts, d))}
        for name, (tensor, shape) in shapes.items():
            if tensor is not None:
                _check(name, tensor, (up.dtype,), shape)
        if router is not None:
            _check("router", router, (up.dtype, torch.float32), (experts - shared, d))
        base = down_bias
        if means is not None:  # all of them, of which experts that run take theirs away
            means = means.clone()
            base = (means.double().sum(0) + (0 if down_bias is None else down_bias)).to(up.dtype)
        self.d, self.k, self.dtype, self.routed, self.threads = d, k, up.dtype, router is not None, threads
        self.kept = (router, up, gate, down, up_bias, gate_bias, base, means)
        pointers = (None if tensor is None else tensor.data_ptr() for tensor in self.kept)
        halves = (up.dtype == torch.bfloat16, router is not None and router.dtype == torch.bfloat16)
        sizes = (d, experts, expert_size, shared)
        self.struct = _Ffn(*pointers, *sizes, ACTIVATIONS.index(activation), *halves)
        self.pointer = ctypes.byref(self.struct)
        self.run = library().moefy_ffn
        self.run.argtypes = (*[ctypes.c_void_p] * 3, ctypes.c_int64, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32)

    def __call__(self, x: torch.Tensor, experts: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """experts: (..., K) int32, where there is no router; K is any, an expert comes at most once per token, and
        unused slots hold -1.

        Raises:
            ValueError: x or experts of another dtype, device or shape, or out of range; a router and experts, or
                neither.
        """
        if self.routed == (experts is not None):
            raise ValueError("give a router or experts")
        x = x.contiguous()
        _check("x", x, (self.dtype,), (*x.shape[:-1], self.d))
        if experts is None:
            experts = torch.empty((*x.shape[:-1], self.k), dtype=torch.int32)
        else:
            experts = experts.contiguous()
            _check("experts", experts, (torch.int32,), (*x.shape[:-1], experts.shape[-1]))
            low, high = (int(each) for each in experts.aminmax()) if experts.numel() else (-1, -1)
            if low < -1 or high >= self.struct.num_experts:
                raise ValueError(f"experts must lie in [-1, {self.struct.num_experts}), got {low} to {high}")
        y, tokens = torch.empty_like(x), x.numel() // self.d
        if tokens:
            threads = self.threads or torch.get_num_threads()
            self.run(self.pointer, x.data_ptr(), experts.data_ptr(), experts.shape[-1], y.data_ptr(), tokens, threads)
        return y, experts


def moe_ffn(
    x: torch.Tensor, up: torch.Tensor, down: torch.Tensor, *, experts: torch.Tensor | None = None, **settings
) -> tuple[torch.Tensor, torch.Tensor]:
    """One call of `MoeFfn(up, down, **settings)`, which is worth keeping for more of them."""
    return MoeFfn(up, down, **settings)(x, experts)


def _check(name: str, tensor: torch.Tensor, dtypes: tuple[torch.dtype, ...], shape: tuple[int, ...]) -> None:
    if (
        tensor.dtype not in dtypes
        or tensor.device.type != "cpu"
        or tensor.shape != shape
        or not tensor.is_contiguous()
    ):
        layout = "" if tensor.is_contiguous() else "not contiguous "
        raise ValueError(
            f"{name} must be a contiguous {dtypes[0]} tensor of shape {tuple(shape)} on the CPU, got a {layout}"
            f"{tensor.dtype} of shape {tuple(tensor.shape)} on {tensor.device}"
        )
