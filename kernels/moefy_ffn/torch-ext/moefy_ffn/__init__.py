"""The routed FFN as one call: router, selection, and the chosen experts' neurons, nothing else computed.

    y, experts = moe_ffn(x, up, down, k=10, expert_size=32, activation="relu", router=router)

Weights are read where they lie, a row per neuron, so that a model's own parameters serve; see `ffn.cpp`.
"""

import ctypes

import torch

from .build import BuildError, library

__all__ = ["ACTIVATIONS", "SELECTIONS", "STRENGTHS", "BuildError", "MoeFfn", "moe_ffn"]

ACTIVATIONS = ("relu", "gelu", "gelu_tanh", "silu", "relu_squared", "quick_gelu")  # in the order of activations.h
SELECTIONS, STRENGTHS = ("top_k", "threshold", "top_p", "level"), ("softmax", "sigmoid")  # in that of selection.h


class _Ffn(ctypes.Structure):
    _fields_ = [
        *(
            (name, ctypes.c_void_p)
            for name in ("router", "router_in", "up", "gate", "down", "up_bias", "gate_bias", "base", "means")
        ),
        *((name, ctypes.c_int64) for name in ("d", "num_experts", "expert_size", "shared", "rank")),
        *(
            (name, ctypes.c_int32)
            for name in ("activation", "is_bfloat16", "router_is_bfloat16", "selection", "strengths")
        ),
        ("setting", ctypes.c_float),
    ]


_POINTER, _COUNT = ctypes.c_void_p, ctypes.c_int64
_ARGUMENTS = (_POINTER, _POINTER, _POINTER, _COUNT, _COUNT, _POINTER, _COUNT, ctypes.c_int32)


class MoeFfn:
    """A routed FFN's weights, checked once: calling it with x (..., d) gives the output (..., d) of the experts that
    each token selects, and which ran (..., K) int32: K is k, or E with -1 in the slots of experts that did not.

    FFN(x) = down^T act(up x + up_bias) + down_bias; gated, down^T (act(gate x + gate_bias) * (up x + up_bias)) +
    down_bias; over the neurons of the selected experts, expert e owning neurons [e * expert_size, (e + 1) *
    expert_size). Everything is float32, or everything bfloat16, whose sums are float32.

    Args:
        up, gate, down: (f, d), a row per neuron, contiguous on the CPU; `down` is transposed nn.Linear's. They are
            read where they are: a change in place is seen.
        router: (E - shared, d); its scores router x select. Without, calls say which experts run. It may be float32
            in a bfloat16 FFN.
        router_in: (rank, d), of the router's dtype, before a router (E - shared, rank): scores router router_in x.
        k: how many run with "top_k": those of the largest scores.
        selection: one of `SELECTIONS`. "threshold": experts at least 1 - setting times as strong as the token's
            strongest; "top_p": the strongest, until together they have the share `setting` of the token's strength;
            "level": those of at least the strength exp(-setting), which may be none.
        strengths: one of `STRENGTHS`: what these make of scores.
        shared: experts 0 to shared - 1 run for every token; k counts them.
        means: (E, d) what each expert adds to the output of a token that does not run it; copied.
        threads: of a call; by default those of torch.

    Raises:
        BuildError: the kernel cannot be compiled here.
        ValueError: a tensor of another dtype, device, shape or layout, an unknown name, k out of range, or a selection
            other than "top_k" without a router or with k or without a setting.
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
        router_in: torch.Tensor | None = None,
        shared: int = 0,
        selection: str = "top_k",
        setting: float | None = None,
        strengths: str = "softmax",
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
        codes = {
            "activation": _code("activation", activation, ACTIVATIONS),
            "selection": _code("selection", selection, SELECTIONS),
            "strengths": _code("strengths", strengths, STRENGTHS),
        }
        experts, dynamic = f // expert_size, selection != "top_k"
        if dynamic != (setting is not None) or (dynamic and (k is not None or router is None)):
            told = f"{selection!r} with k={k}, setting={setting}"
            raise ValueError(f"{told}: top_k has k, others a router and a setting")
        slots = experts if dynamic else k
        fits = router is None or (slots and 0 <= shared <= slots <= experts and shared < experts)
        if f % expert_size or not fits:
            sizes = f"{f} neurons and {shared} shared experts"
            raise ValueError(f"k={k} of experts of {expert_size} neurons does not fit {sizes}")
        shapes = {"up": (up, (f, d)), "gate": (gate, (f, d)), "down": (down, (f, d)), "down_bias": (down_bias, (d,))}
        shapes |= {"up_bias": (up_bias, (f,)), "gate_bias": (gate_bias, (f,)), "means": (means, (experts, d))}
        for name, (tensor, shape) in shapes.items():
            if tensor is not None:
                _check(name, tensor, (up.dtype,), shape)
        rank = _check_router(router, router_in, experts - shared, d, up.dtype)
        base = down_bias
        if means is not None:  # all of them, of which experts that run take theirs away
            means = means.clone()
            base = (means.double().sum(0) + (0 if down_bias is None else down_bias)).to(up.dtype)
        self.d, self.slots, self.dtype, self.routed, self.threads = d, slots, up.dtype, router is not None, threads
        self.kept = (router, router_in, up, gate, down, up_bias, gate_bias, base, means)
        pointers = (None if tensor is None else tensor.data_ptr() for tensor in self.kept)
        codes["is_bfloat16"] = up.dtype == torch.bfloat16
        codes["router_is_bfloat16"] = router is not None and router.dtype == torch.bfloat16
        self.struct = _Ffn(*pointers, d, experts, expert_size, shared, rank, **codes, setting=setting or 0.0)
        self.pointer = ctypes.byref(self.struct)
        self.run = library().moefy_ffn
        self.run.argtypes, self.run.restype = _ARGUMENTS, ctypes.c_bool

    def __call__(self, x: torch.Tensor, experts: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """experts: (..., K) int32, where there is no router; K is any, an expert comes at most once per token, and
        unused slots hold -1.

        Raises:
            ValueError: x or experts of another dtype, device or shape, or out of range; a router and experts, or
                neither.
        """
        if self.routed == (experts is not None):
            raise ValueError("give a router or experts")
        x = self.checked(x)
        if experts is None:
            experts = self.slots_for(x)
        else:
            experts = experts.contiguous()
            _check("experts", experts, (torch.int32,), (*x.shape[:-1], experts.shape[-1]))
            low, high = (int(each) for each in experts.aminmax()) if experts.numel() else (-1, -1)
            if low < -1 or high >= self.struct.num_experts:
                raise ValueError(f"experts must lie in [-1, {self.struct.num_experts}), got {low} to {high}")
        y = torch.empty_like(x)
        self.compute(x, experts, y, most=-1)
        return y, experts

    def within(self, x: torch.Tensor, share: float) -> torch.Tensor | None:
        """The output for x (..., d) by the router, or None where its tokens select more than this share of the
        experts, on average: then nothing is computed but scores.

        Raises:
            ValueError: x of another dtype, device or shape, or no router.
        """
        if not self.routed:
            raise ValueError("a share is for FFNs with a router")
        x = self.checked(x)
        y = torch.empty_like(x)
        most = int(share * self.struct.num_experts * (x.numel() // self.d))
        return y if self.compute(x, self.slots_for(x), y, most) else None

    def checked(self, x: torch.Tensor) -> torch.Tensor:
        x = x.contiguous()
        _check("x", x, (self.dtype,), (*x.shape[:-1], self.d))
        return x

    def slots_for(self, x: torch.Tensor) -> torch.Tensor:
        return torch.empty((*x.shape[:-1], self.slots), dtype=torch.int32)

    def compute(self, x: torch.Tensor, experts: torch.Tensor, y: torch.Tensor, most: int) -> bool:
        """See `ffn.cpp`."""
        tokens, threads = x.numel() // self.d, self.threads or torch.get_num_threads()
        places = (x.data_ptr(), experts.data_ptr(), experts.shape[-1], most, y.data_ptr())
        return not tokens or self.run(self.pointer, *places, tokens, threads)


def moe_ffn(
    x: torch.Tensor, up: torch.Tensor, down: torch.Tensor, *, experts: torch.Tensor | None = None, **settings
) -> tuple[torch.Tensor, torch.Tensor]:
    """One call of `MoeFfn(up, down, **settings)`, which is worth keeping for more of them."""
    return MoeFfn(up, down, **settings)(x, experts)


def _code(what: str, name: str, names: tuple[str, ...]) -> int:
    if name not in names:
        raise ValueError(f"unknown {what} {name!r}; choose from {', '.join(names)}")
    return names.index(name)


def _check_router(
    router: torch.Tensor | None, router_in: torch.Tensor | None, experts: int, d: int, dtype: torch.dtype
) -> int:
    """Its rank; 0 of one matrix, or none."""
    if router_in is None:
        if router is not None:
            _check("router", router, (dtype, torch.float32), (experts, d))
        return 0
    if router is None:
        raise ValueError("router_in is nothing without a router")
    rank = router.shape[-1] if router.dim() else 0
    if not rank:
        raise ValueError(f"router must have columns, got shape {tuple(router.shape)}")
    _check("router", router, (dtype, torch.float32), (experts, rank))
    _check("router_in", router_in, (router.dtype,), (rank, d))
    return rank


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
