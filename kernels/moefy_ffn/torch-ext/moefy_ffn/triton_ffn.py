"""The routed FFN on GPUs, differentiable: launches the kernels of `triton_kernels.py`.

    y = triton_moe_ffn(x, up, down, experts, expert_size=32, activation="silu", gate=gate)

Fused for inference. With gradients it is two linear maps with the activation between them in torch, from tokens to the
neurons of their experts (`ToNeurons`) and back (`ToTokens`); each is the other's gradient, but for the weights.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
from torch.autograd.function import once_differentiable

from . import triton_kernels as kernels

ACTIVATIONS = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "relu_squared": lambda x: F.relu(x).square(),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FEW_TOKENS = 8  # up to here a pair at a time; a guess, as are the sizes of blocks
LARGEST_ROWS = 2**28  # bytes of rows (T * K, width) at once; more columns take turns


class Routing(NamedTuple):
    """Which expert each pair (token, slot) has, and blocks of BLOCK_P pairs that share one."""

    experts: torch.Tensor  # (T, K) int32, -1 in unused slots
    expert_size: int
    order: torch.Tensor  # (T * K) pairs, by expert; unused ones last
    starts: torch.Tensor  # (E + 1) where each expert's begin
    block_expert: torch.Tensor  # (B) -1 in surplus blocks
    block_first: torch.Tensor  # (B) place in `order`
    block: int


def group(experts: torch.Tensor, num_experts: int, expert_size: int) -> Routing:
    """experts (T, K) -> pairs by expert, without waiting for the device: as many blocks as there could be."""
    pairs, device = experts.numel(), experts.device
    block = min(max(triton.next_power_of_2(pairs // num_experts), 16), 64)
    keys, order = experts.flatten().where(experts.flatten() >= 0, num_experts).sort(stable=True)
    starts = torch.searchsorted(keys, torch.arange(num_experts + 1, device=device, dtype=keys.dtype))
    blocks = (starts.diff() + block - 1) // block  # (E) of each expert
    ends = blocks.cumsum(0)
    number = torch.arange(min(pairs, (pairs + num_experts * (block - 1)) // block), device=device)
    expert = torch.searchsorted(ends, number, right=True)
    own = expert.clamp_max(num_experts - 1)
    first = starts[own] + (number - ends[own] + blocks[own]) * block
    expert = expert.where(expert < num_experts, -1)
    return Routing(experts, expert_size, order.int(), starts.int(), expert.int(), first.int(), block)


def triton_moe_ffn(
    x: torch.Tensor,
    up: torch.Tensor,
    down: torch.Tensor,
    experts: torch.Tensor,
    *,
    expert_size: int,
    activation: str,
    gate: torch.Tensor | None = None,
    up_bias: torch.Tensor | None = None,
    gate_bias: torch.Tensor | None = None,
    down_bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """x (..., d) -> (..., d): what `MoeFfn` computes, with gradients for x, weights and biases, not for the choice.

    Args:
        x: float32, bfloat16 or float16 on a GPU, or on the CPU where TRITON_INTERPRET=1; sums are float32.
        up, gate, down: (f, d), a row per neuron, of x's dtype and device and of any strides.
        experts: (..., K) int32, each at most once per token, -1 in unused slots; not checked, for that would wait for
            the device.

    Raises:
        ValueError: a tensor of another dtype, device or shape, an unknown activation, or a misfitting expert size.
    """
    f, d = up.shape
    if activation not in ACTIVATIONS:
        raise ValueError(f"unknown activation {activation!r}; choose from {', '.join(ACTIVATIONS)}")
    if x.dtype not in DTYPES:
        raise ValueError(f"x is {x.dtype}; choose from {', '.join(map(str, DTYPES))}")
    if expert_size < 1 or f % expert_size:
        raise ValueError(f"experts of {expert_size} neurons do not fit {f} neurons")
    shapes = {"x": (x, (*x.shape[:-1], d)), "up": (up, (f, d)), "gate": (gate, (f, d)), "down": (down, (f, d))}
    shapes |= {"up_bias": (up_bias, (f,)), "gate_bias": (gate_bias, (f,)), "down_bias": (down_bias, (d,))}
    for name, (tensor, shape) in shapes.items():
        if tensor is not None:
            _check(name, tensor, x.dtype, x.device, shape)
    _check("experts", experts, torch.int32, x.device, (*x.shape[:-1], experts.shape[-1]))
    tokens, chosen = x.reshape(-1, d), experts.reshape(-1, experts.shape[-1]).contiguous()
    up_bias, gate_bias, down_bias = (None if b is None else b.contiguous() for b in (up_bias, gate_bias, down_bias))
    given = [tensor for tensor in (x, up, gate, down, up_bias, gate_bias, down_bias) if tensor is not None]
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given):
        routing, act = group(chosen, f // expert_size, expert_size), ACTIVATIONS[activation]
        with torch.autocast(x.device.type, enabled=False):  # the activation stays in x's dtype
            hidden = ToNeurons.apply(tokens, up, up_bias, routing)
            hidden = act(hidden) if gate is None else act(ToNeurons.apply(tokens, gate, gate_bias, routing)) * hidden
            y = ToTokens.apply(hidden, down, down_bias, routing)
    else:
        few = len(tokens) <= FEW_TOKENS
        routing = chosen if few else group(chosen, f // expert_size, expert_size)
        hidden = x.new_empty(chosen.numel(), expert_size)
        neurons_(hidden, tokens, up, up_bias, routing, activation, gate, gate_bias)
        y = tokens_from(hidden, down, down_bias, routing)
    return y.view(x.shape)


class ToNeurons(torch.autograd.Function):
    """x (T, d), weight (f, d), bias (f) -> (T * K, m): the neurons of each token's experts; zero in unused slots."""

    @staticmethod
    def forward(ctx, x, weight, bias, routing):
        ctx.save_for_backward(x, weight)
        ctx.routing, ctx.biased = routing, bias is not None
        return neurons_(x.new_zeros(routing.experts.numel(), routing.expert_size), x, weight, bias, routing)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        grad = grad.contiguous()
        grad_x = tokens_from(grad, weight, None, ctx.routing) if ctx.needs_input_grad[0] else None
        if not any(ctx.needs_input_grad[1:3]):
            return grad_x, None, None, None
        return grad_x, *weights_from(grad, x, weight, ctx.biased, ctx.routing), None


class ToTokens(torch.autograd.Function):
    """hidden (T * K, m), weight (f, d), bias (d) -> (T, d): each token's neurons times their rows, summed."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, routing):
        ctx.save_for_backward(hidden, weight)
        ctx.routing, ctx.biased = routing, bias is not None
        return tokens_from(hidden, weight, bias, routing)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        hidden, weight = ctx.saved_tensors
        grad_hidden = neurons_(torch.zeros_like(hidden), grad, weight, None, ctx.routing)
        grad_weight = weights_from(hidden, grad, weight, False, ctx.routing)[0] if ctx.needs_input_grad[1] else None
        return grad_hidden, grad_weight, grad.sum(0) if ctx.biased else None, None


def neurons_(out, x, up, up_bias, routing, activation="none", gate=None, gate_bias=None) -> torch.Tensor:
    """x (T, d) -> out (T * K, m), written in the used slots; `routing` is the experts (T, K) for a pair at a time."""
    m, slots = out.shape[1], (routing if torch.is_tensor(routing) else routing.experts).shape[1]
    strides = (*x.stride(), *up.stride(), *((0, 0) if gate is None else gate.stride()))
    tensors, sizes = (x, up, gate, up_bias, gate_bias, out), (x.shape[1], m, slots)
    with torch.cuda.device_of(x):
        if out.numel() == 0:
            return out
        if torch.is_tensor(routing):
            size = min(triton.next_power_of_2(m), 8)
            kernels.neurons_of_pairs[len(out), triton.cdiv(m, size)](
                *tensors, routing, *sizes, *strides, activation, BLOCK_M=size, BLOCK_D=256
            )
        else:
            blocks = _blocks(routing, x)
            kernels.neurons_of_blocks[len(routing.block_expert), triton.cdiv(m, blocks["BLOCK_M"])](
                *tensors, *routing[2:6], *sizes, *strides, activation, **blocks
            )
    return out


def tokens_from(hidden, down, bias, routing) -> torch.Tensor:
    """hidden (T * K, m) -> y (T, d). Each pair has a row of its own, added up per token in a fixed order: atomic sums
    would differ from run to run."""
    experts = routing if torch.is_tensor(routing) else routing.experts
    (tokens, slots), m, d = experts.shape, hidden.shape[1], down.shape[1]
    y = hidden.new_empty(tokens, d)
    if y.numel() == 0:
        return y
    width = min(d, max(LARGEST_ROWS // (4 * max(len(hidden), 1)) // 128 * 128, 128))
    rows = hidden.new_empty(len(hidden), width, dtype=torch.float32)
    with torch.cuda.device_of(hidden):
        for first in range(0, d, width):
            here = min(width, d - first)
            sizes = (first, here, m, *down.stride())
            if torch.is_tensor(routing):
                kernels.rows_of_pairs[len(hidden), triton.cdiv(here, 128)](
                    hidden, down, rows, experts, *sizes, BLOCK_M=min(triton.next_power_of_2(m), 16), BLOCK_D=128
                )
            else:
                blocks = _blocks(routing, hidden)
                kernels.rows_of_blocks[len(routing.block_expert), triton.cdiv(here, blocks["BLOCK_D"])](
                    hidden, down, rows, *routing[2:6], *sizes, **blocks
                )
            kernels.add_pairs[tokens, triton.cdiv(here, 512)](
                rows, bias, experts, y, first, here, d, slots, BLOCK_D=512
            )
    return y


def weights_from(left, right, weight, biased, routing) -> tuple[torch.Tensor, torch.Tensor | None]:
    """left (T * K, m), right (T, d) -> gradients of weight (f, d) and its bias (f); zero for experts nobody chose."""
    grad, bias = torch.empty_like(weight), weight.new_empty(len(weight)) if biased else None
    blocks, m, d = _blocks(routing, right), left.shape[1], right.shape[1]
    grid = (len(routing.starts) - 1, triton.cdiv(m, blocks["BLOCK_M"]), triton.cdiv(d, blocks["BLOCK_D"]))
    sizes = (d, m, routing.experts.shape[1], *right.stride(), *grad.stride())
    with torch.cuda.device_of(left):
        kernels.weights_of_experts[grid](left, right, grad, bias, *routing[2:4], *sizes, **blocks)
    return grad, bias


def _blocks(routing: Routing, x: torch.Tensor) -> dict:
    """Sizes of the blocks of pairs, neurons and columns; float32 is multiplied as torch.matmul does."""
    return {
        "PRECISION": "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32",
        "BLOCK_P": routing.block,
        "BLOCK_M": min(max(triton.next_power_of_2(routing.expert_size), 16), 64),
        "BLOCK_D": 128 // x.element_size(),
    }


def _check(name: str, tensor: torch.Tensor, dtype: torch.dtype, device: torch.device, shape: tuple[int, ...]) -> None:
    if tensor.dtype != dtype or tensor.device != device or tensor.shape != shape:
        raise ValueError(
            f"{name} must be a {dtype} tensor of shape {tuple(shape)} on {device}, got {tensor.dtype} of shape "
            f"{tuple(tensor.shape)} on {tensor.device}"
        )
