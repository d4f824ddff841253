"""How fast a routed FFN is: `moefy bench` times dense and sparse in turns, on weights that no cache holds.

A case is one FFN of a preset's shape with random weights, ReLU or SwiGLU, and uniformly random routing. Layers rotate
over a gigabyte, each method at its own offset, so that every call reads its weights from memory, as a model does.
"""

import os
import platform
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from moefy_ffn import MoeFfn
from tqdm.auto import tqdm

COLD_BYTES = 1_000_000_000  # of weights to rotate over


@dataclass(frozen=True)
class Shape:
    """d, f, and whether the FFN is gated (three matrices, SiLU) or not (two, ReLU)."""

    d: int
    f: int
    gated: bool = False


PRESETS = {
    "minilm": Shape(384, 1536),
    "t5-base": Shape(768, 3072),
    "t5-large": Shape(1024, 4096),
    "opt-1.3b": Shape(2048, 8192),
    "smollm2-135m": Shape(576, 1536, gated=True),
    "llama-1b": Shape(2048, 5632, gated=True),
}


@dataclass
class Layer:
    """One FFN's weights, as a dense model holds them, prepacked, and a row per neuron."""

    up: torch.Tensor
    down: torch.Tensor
    gate: torch.Tensor | None
    router: torch.Tensor
    rows: torch.Tensor  # down, a row per neuron
    packed: list[tuple[torch.Tensor, torch.Tensor]]  # (prepacked, as it was) of gate, up, down
    kernels: dict[int, MoeFfn]  # of each k


def bench(
    preset: str,
    *,
    share: float = 0.2,
    expert_size: int = 32,
    tokens: list[int] | None = None,
    threads: int = 1,
    rounds: int = 40,
    progress: bool = True,
) -> dict[str, Any]:
    """Time one FFN of a preset's shape, float32 on the CPU.

    Args:
        share: of the experts that are computed.
        tokens: numbers of tokens per call.
        rounds: timings of each method; their order is drawn anew in each.

    Returns:
        settings, hardware and rows. `ratio`: dense time over the method's, the median of the rounds; `spread`: a
        quarter of the rounds lie below and above; `ratio_best_dense`: the same against prepacked oneDNN where that is
        faster than torch; `fraction_of_bound`: the least time for the bytes and operations at hand, as measured here,
        over the method's time.

    Raises:
        ValueError: an unknown preset, or an expert size that does not divide its FFN.
    """
    if preset not in PRESETS:
        raise ValueError(f"unknown preset {preset!r}; choose from {', '.join(PRESETS)}")
    shape, tokens = PRESETS[preset], tokens or [1, 2, 4, 8, 128, 512]
    if expert_size < 1 or shape.f % expert_size:
        raise ValueError(f"experts of {expert_size} neurons do not divide the {shape.f} of {preset}")
    if not 0 < share <= 1 or min(tokens) < 1 or threads < 1:
        raise ValueError(f"share must lie in (0, 1], tokens and threads be positive: {share}, {tokens}, {threads}")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.no_grad():
            limits = machine_limits()
            layers = make_layers(shape, expert_size)
            k = max(1, round(share * shape.f / expert_size))
            rows = []
            for count in tqdm(tokens, desc=f"bench {preset}", unit="size", disable=not progress):
                rows += measure(shape, layers, expert_size, k, count, rounds, limits)
    finally:
        torch.set_num_threads(before)
    settings = {"preset": preset, "d": shape.d, "f": shape.f, "gated": shape.gated, "dtype": "float32"}
    settings |= {"threads": threads, "share": share, "expert_size": expert_size, "k": k, "rounds": rounds}
    return {"settings": settings, "hardware": hardware(), "limits": limits, "rows": rows}


def make_layers(shape: Shape, expert_size: int) -> list[Layer]:
    generator = torch.Generator().manual_seed(0)
    matrices = 3 if shape.gated else 2

    def noise(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, generator=generator) * columns**-0.5

    layers = []
    for _ in range(max(2, COLD_BYTES // (4 * shape.d * shape.f * matrices))):
        up, down = noise(shape.f, shape.d), noise(shape.d, shape.f)
        gate = noise(shape.f, shape.d) if shape.gated else None
        packed = [
            (torch.ops.mkldnn._reorder_linear_weight(each), each) for each in (gate, up, down) if each is not None
        ]
        layers.append(Layer(up, down, gate, noise(shape.f // expert_size, shape.d), down.t().contiguous(), packed, {}))
    return layers


def dense(x: torch.Tensor, layer: Layer) -> torch.Tensor:
    if layer.gate is None:
        return F.linear(F.relu(F.linear(x, layer.up)), layer.down)
    return F.linear(F.silu(F.linear(x, layer.gate)) * F.linear(x, layer.up), layer.down)


def prepacked(x: torch.Tensor, layer: Layer) -> torch.Tensor:
    def linear(x: torch.Tensor, weight: tuple[torch.Tensor, torch.Tensor], act: str = "none") -> torch.Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, weight[0], None, act, [], "")

    *gate, up, down = layer.packed
    hidden = linear(x, gate[0], "swish") * linear(x, up) if gate else linear(x, up, "relu")
    return linear(hidden, down)


def measure(
    shape: Shape, layers: list[Layer], expert_size: int, k: int, count: int, rounds: int, limits: dict[str, float]
) -> list[dict[str, Any]]:
    """The rows of one number of tokens."""
    activation = "silu" if shape.gated else "relu"
    generator = torch.Generator().manual_seed(count)

    def sparse(x: torch.Tensor, layer: Layer) -> torch.Tensor:
        return layer.kernels[k](x)[0]

    settings = {"k": k, "expert_size": expert_size, "activation": activation}
    for layer in layers:
        layer.kernels[k] = MoeFfn(layer.up, layer.rows, router=layer.router, gate=layer.gate, **settings)
    check(torch.randn(count, shape.d, generator=generator), layers[0], sparse, expert_size, k)
    methods: dict[str, Callable] = {"dense": dense, "prepacked": prepacked, "cpu": sparse}
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    order = list(methods)
    draw = random.Random(0)
    for turn in range(rounds):
        draw.shuffle(order)
        x = torch.randn(count, shape.d, generator=generator)  # which selects other experts
        for name in order:
            layer = layers[(turn + list(methods).index(name) * len(layers) // 3) % len(layers)]
            started = time.perf_counter()
            methods[name](x, layer)
            seconds[name].append(time.perf_counter() - started)
    best = min(("dense", "prepacked"), key=lambda name: statistics.median(seconds[name]))
    bound = least_seconds(shape, expert_size, k, count, limits)
    ratios = sorted(a / b for a, b in zip(seconds["dense"], seconds["cpu"], strict=True))
    taken = statistics.median(seconds["cpu"])
    return [
        {
            "implementation": "cpu",
            "tokens": count,
            "ratio": statistics.median(ratios),
            "spread": [ratios[rounds // 4], ratios[-1 - rounds // 4]],
            "ratio_best_dense": statistics.median(a / b for a, b in zip(seconds[best], seconds["cpu"], strict=True)),
            "best_dense": best,
            "fraction_of_bound": bound / taken,
            "milliseconds": 1e3 * taken,
            "dense_milliseconds": 1e3 * statistics.median(seconds["dense"]),
        }
    ]


def check(x: torch.Tensor, layer: Layer, sparse: Callable, expert_size: int, k: int) -> None:
    """Before anything is timed: the sparse output is the masked one."""
    scores = F.linear(x, layer.router)
    keep = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, scores.topk(k).indices, True)
    hidden = F.linear(x, layer.up)
    hidden = F.relu(hidden) if layer.gate is None else F.silu(F.linear(x, layer.gate)) * hidden
    expected = F.linear(hidden.masked_fill(~keep.repeat_interleave(expert_size, -1), 0), layer.down)
    found = sparse(x, layer)
    if not (found - expected).norm() <= 1e-4 * expected.norm():
        raise RuntimeError("the kernel's output is not that of the masked FFN: nothing was timed")


def least_seconds(shape: Shape, expert_size: int, k: int, count: int, limits: dict[str, float]) -> float:
    """What the selected rows' bytes, or the operations on them, take at this machine's measured best."""
    experts = shape.f // expert_size
    matrices = 3 if shape.gated else 2
    union = experts * (1 - (1 - k / experts) ** count)  # expected, for uniform routing
    numbers = (matrices * union * expert_size + experts) * shape.d
    flops = 2 * count * (matrices * k * expert_size + experts) * shape.d
    return max(4 * numbers / limits["bytes_per_second"], flops / limits["flops_per_second"])


def machine_limits() -> dict[str, float]:
    """The best of some tries: reading memory in one stream, and a large matrix product."""
    memory = torch.ones(20_000, 5_000)
    square, vector = torch.randn(1024, 1024), torch.ones(5_000)
    read = min(min(timed(memory.sum), timed(memory.mv, vector)) for _ in range(6))
    product = min(timed(square.mm, square) for _ in range(8))
    return {"bytes_per_second": 4 * memory.numel() / read, "flops_per_second": 2 * 1024**3 / product}


def timed(function: Callable, *arguments: Any) -> float:
    started = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - started


def hardware() -> str:
    """The processor's name, its vector instructions, and how many cores there are."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}, {os.cpu_count()} cores, torch {torch.__version__}"


def table(found: dict[str, Any]) -> str:
    lines = [
        "| tokens | times dense | middle half | times best dense | of the bound | ms |",
        "|---|---|---|---|---|---|",
    ]
    for row in found["rows"]:
        low, high = row["spread"]
        lines.append(
            f"| {row['tokens']} | {row['ratio']:.2f} | {low:.2f} to {high:.2f} | {row['ratio_best_dense']:.2f} "
            f"({row['best_dense']}) | {row['fraction_of_bound']:.0%} | {row['milliseconds']:.3g} |"
        )
    settings = ", ".join(f"{name} {value}" for name, value in found["settings"].items())
    return "\n".join([f"{found['hardware']}; {settings}", "", *lines])
