"""FFNs of random numbers, and what they compute in float64: dense, then masked."""

import torch
import torch.nn.functional as F

REFERENCE = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "relu_squared": lambda x: F.relu(x).square(),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
}
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}  # of the largest output; bfloat16 rounds to 4e-3 of a number


def made(
    tokens: int, d: int, experts: int, m: int, gated: bool, biased: bool, seed: int = 0, dtype=torch.float32
) -> dict:
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator) / shape[-1] ** 0.5).to(dtype)

    f = experts * m
    found = {"x": noise(tokens, d) * d**0.5, "up": noise(f, d), "down": noise(f, d), "router": noise(experts, d)}
    found |= {"gate": noise(f, d) if gated else None}
    biases = {"up_bias": (f,), "gate_bias": (f,), "down_bias": (d,)}
    return found | {
        name: noise(*shape) if biased and (gated or name != "gate_bias") else None for name, shape in biases.items()
    }


def kept(experts: torch.Tensor, count: int) -> torch.Tensor:
    """(T, K) with -1 in unused slots -> (T, E) bool"""
    return F.one_hot(experts.long() + 1, count + 1).sum(1)[:, 1:].bool()


def low_rank(router: torch.Tensor, rank: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Two matrices in place of a router (E, d), of its dtype and by way of `rank` numbers."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"router": (len(router), rank), "router_in": (rank, router.shape[1])}
    return {
        name: (torch.randn(shape, generator=generator) / shape[1] ** 0.5).to(router.dtype)
        for name, shape in shapes.items()
    }


def scores_of(x: torch.Tensor, router: torch.Tensor, router_in: torch.Tensor | None = None) -> torch.Tensor:
    """(T, E) in float64; in bfloat16, numbers between two matrices are rounded, as torch does."""
    if router_in is None:
        return x.double() @ router.double().T
    between = x.double() @ router_in.double().T
    return (between.to(router.dtype) if router.dtype == torch.bfloat16 else between).double() @ router.double().T


def reference(
    x, up, down, router, gate, up_bias, gate_bias, down_bias, keep, activation, means=None, router_in=None
) -> torch.Tensor:
    """Dense, then masked, in float64."""
    x, up, down, router, gate, up_bias, gate_bias, down_bias, means = (
        None if t is None else t.double() for t in (x, up, down, router, gate, up_bias, gate_bias, down_bias, means)
    )
    act = REFERENCE[activation]
    hidden = F.linear(x, up, up_bias)
    hidden = act(hidden) if gate is None else act(F.linear(x, gate, gate_bias)) * hidden
    y = hidden.masked_fill(~keep.repeat_interleave(len(up) // keep.shape[-1], -1), 0) @ down
    y = y if means is None else y + (~keep).double() @ means
    return y if down_bias is None else y + down_bias


def close(y: torch.Tensor, expected: torch.Tensor) -> None:
    tolerance = TOLERANCE[y.dtype]
    largest = max(float(expected.abs().max()), 1e-30)
    torch.testing.assert_close(y.double(), expected, rtol=tolerance, atol=tolerance * largest)
