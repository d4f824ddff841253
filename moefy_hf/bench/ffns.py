"""`moefy bench`: one FFN, dense and routed in turns, on weights that no cache holds.

Layers rotate over a gigabyte, each method at its own offset, so that every call reads its weights from memory, as a
model does. Inputs are noise, and so is a preset's routing.
"""

import statistics
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from tqdm.auto import tqdm

from ..errors import MoefyError
from ..loading import routed
from ..modeling.routed_activation import RoutedActivation
from ..runtime.torch_rows import FEW_TOKENS
from .layers import Layer, checkpoint_layers, compiled, copy_of, dense, indexed, masked, prepacked, preset_layers
from .settings import CHECKED, DTYPES, TOLERANCE, Settings
from .timing import against, hardware, machine_limits, quartiles, take_turns, threads_set

COLD_BYTES = 1_000_000_000  # of weights to rotate over
TOKENS = (1, 2, 4, 8, 128, 512)

Method = Callable[[Layer, torch.Tensor], torch.Tensor]
METHODS: dict[str, Method] = {
    "dense": dense,
    "dense prepacked": prepacked,
    "masked": masked,
    "torch": indexed,
    "cpu": compiled,
}


def bench_ffns(
    settings: Settings,
    tokens: tuple[int, ...] = TOKENS,
    *,
    cold: bool = True,
    nonzero: float | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Time one FFN of a preset's shape, or those of a checkpoint, on the CPU.

    Args:
        settings: what is timed, and how long.
        tokens: numbers of tokens per call.
        cold: rotate over many layers; else a single one, which small FFNs leave in the cache.
        nonzero: biases that leave at most this share of ReLU's neurons non-zero (else half of them are).

    Returns:
        `settings`, `hardware`, `limits` and `rows`. `ratio`: the time of `F.linear` over the method's, the median of
        the rounds; `spread`: a quarter of them lie below and above; `ratio_best_dense`: the same against prepacked
        oneDNN where that is faster; `fraction_of_bound`: the least time for the bytes and operations at hand, at this
        machine's measured best, over the method's time; `bound`: which of them it is.

    Raises:
        MoefyError: settings that the FFNs do not fit.
    """
    if not tokens or min(tokens) < 1:
        raise MoefyError(f"tokens must be positive, got {', '.join(map(str, tokens))}")
    if "auto" in settings.implementations:
        raise MoefyError("implementation 'auto' is for whole models: it chooses among the others call by call")
    if nonzero is not None and (settings.preset is None or not 0 < nonzero <= 0.5):
        raise MoefyError(f"nonzero must lie in (0, 0.5] and is for presets, got {nonzero} for {settings.source}")
    with torch.no_grad(), threads_set(settings.threads):
        least = COLD_BYTES if cold else 0
        layers = preset_layers(settings, least, nonzero) if settings.preset else checkpoint_layers(settings, least)
        dtype, rows = DTYPES[settings.dtype], list[dict[str, Any]]()
        tried = [machine_limits(dtype)]
        for count in tqdm(tokens, desc=f"bench {settings.source}", unit="size", disable=not progress):
            rows += measure(layers, settings, count, cold, nonzero is not None, progress)
            tried.append(machine_limits(dtype))
    limits = {name: max(limit[name] for limit in tried) for name in tried[0]}
    rows = [row | attained(row, limits) for row in rows]
    described = settings.to_dict() | {"weights": "cold" if cold else "warm", "nonzero": nonzero}
    return {"settings": described | sizes(layers), "hardware": hardware(), "limits": limits, "rows": rows}


def sizes(layers: list[Layer]) -> dict[str, Any]:
    """Return what the FFNs have in common; lists where they differ."""
    acts = [routed(layer.site) for layer in layers]
    columns: dict[str, list[Any]] = {
        "d": [layer.site.sizes[0] for layer in layers],
        "f": [layer.site.sizes[1] for layer in layers],
        "gated": [layer.weights.gate is not None for layer in layers],
        "activation": [type(act.inner).__name__ for act in acts],
        "router": [type(act.router).__name__ for act in acts],
        "expert_size": [act.expert_size for act in acts],
        "selection": [str(act.selection) for act in acts],
    }
    same = {name: list(dict.fromkeys(values)) for name, values in columns.items()}
    return {name: values[0] if len(values) == 1 else values for name, values in same.items()} | {"layers": len(layers)}


def measure(
    layers: list[Layer],
    settings: Settings,
    count: int,
    cold: bool,
    skip_zeros: bool,
    progress: bool,
) -> list[dict[str, Any]]:
    """Return the rows of one number of tokens, `count`."""
    names = ["dense", *(["dense prepacked"] if layers[0].packed else [])]
    names += [name for name in settings.implementations if name != "torch" or count <= FEW_TOKENS]  # masked beyond
    methods = {name: METHODS[name] for name in names}
    d, dtype = layers[0].site.sizes[0], DTYPES[settings.dtype]
    generator = torch.Generator().manual_seed(count)
    x = check(methods, layers[0], count, generator, TOLERANCE[settings.dtype])
    work = {name: least_work(layers[0], x, name.startswith("dense"), skip_zeros) for name in methods}

    def prepare(turn: int) -> dict[str, Callable[[], Any]]:
        x = torch.randn(count, d, generator=generator).to(dtype)  # which selects other experts
        offsets = [turn + names.index(name) * len(layers) // len(names) for name in names]
        return {
            name: partial(methods[name], layers[offset % len(layers)], x)
            for name, offset in zip(names, offsets if cold else [0] * len(names), strict=True)
        }

    taken = take_turns(prepare, settings.rounds, settings.seconds, f"{count} tokens", progress)
    best = min((name for name in names if name.startswith("dense")), key=lambda name: statistics.median(taken[name]))
    return [row(name, count, taken, best) | work[name] for name in names]


def row(name: str, count: int, taken: dict[str, list[float]], best: str) -> dict[str, Any]:
    """Return the row of one method; `taken` are seconds of each, `best` is the faster of the dense ones."""
    low, middle, high = quartiles(taken[name])
    return {
        "implementation": name,
        "tokens": count,
        **against(taken["dense"], taken[name]),
        "ratio_best_dense": against(taken[best], taken[name])["ratio"],
        "best_dense": best,
        "milliseconds": 1e3 * middle,
        "milliseconds_spread": [1e3 * low, 1e3 * high],
        "rounds": len(taken[name]),
    }


def check(
    methods: dict[str, Method], layer: Layer, count: int, generator: torch.Generator, tolerance: float
) -> torch.Tensor:
    """Check before anything is timed that every method's output is that of the FFN in float64, masked where it is
    routed.

    Args:
        count: tokens of the input.
        tolerance: of an output's length, per token.

    Returns:
        the input (count, d) it was checked on: one with a token whose experts are no matter of rounding.

    Raises:
        RuntimeError: an output is wrong, or no token's experts are certain.
    """
    exact = copy_of(layer.site)
    exact.owner.double()
    reference = replace(layer, site=exact, weights=exact.weights())
    certain = torch.empty(0)
    for _ in range(100):
        x = torch.randn(count, layer.site.sizes[0], generator=generator).to(layer.weights.up.dtype)
        certain = certain_tokens(routed(layer.site), x, generator).nonzero().flatten()
        if len(certain):
            break
    certain = certain[:: -(-len(certain) // CHECKED) or 1]
    if not len(certain):
        raise RuntimeError("no token's experts are certain: nothing can be compared, and nothing was timed")
    for name, method in methods.items():
        run = dense if name.startswith("dense") else masked
        expected, output = run(reference, x[certain].double()), method(layer, x)[certain]
        if not ((output - expected).norm(dim=-1) <= tolerance * expected.norm(dim=-1)).all():
            raise RuntimeError(f"the output of {name!r} is not that of the FFN: nothing was timed")
    return x


def certain_tokens(act: RoutedActivation, x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Return (T,) bool, whether a token of x (T, d) has the same experts when its numbers are rounded otherwise."""
    if act.computes_all:
        return torch.ones(len(x), dtype=torch.bool)
    expert_mask = act.chosen(act.router(x))
    size = 4 * torch.finfo(x.dtype).eps
    noise = (1 + size * torch.randn(x.shape, generator=generator) for _ in range(8))
    return torch.stack([(act.chosen(act.router(x.float() * factor)) == expert_mask).all(-1) for factor in noise]).all(
        0
    )


def least_work(layer: Layer, x: torch.Tensor, is_dense: bool, skip_zeros: bool) -> dict[str, int]:
    """Return the bytes and FLOPs that one call with x (T, d) cannot do without.

    Bytes are those of the router and of the rows of selected experts, of `down` only where their neuron is non-zero
    for some token. FLOPs are those of selected neurons; with `skip_zeros`, of `down` for the non-zero ones.
    """
    (d, f), act, inner = layer.site.sizes, routed(layer.site), 1 + (layer.weights.gate is not None)
    expert_mask, wide = None if is_dense else act.keep(x), torch.ones(len(x), f, dtype=torch.bool)
    if expert_mask is not None:
        wide = expert_mask.repeat_interleave(act.expert_size, -1)
    active = wide if is_dense else wide & (layer.weights.neurons(x) != 0)  # (T, f)
    read = x.element_size() * d * int(inner * wide.any(0).sum() + active.any(0).sum())
    flops = 2 * d * int(inner * wide.sum() + (active if skip_zeros else wide).sum())
    if expert_mask is not None:
        read += sum(weight.nbytes for weight in act.router.parameters())
        flops += len(x) * act.router.flops()
    return {"bytes": read, "flops": flops}


def attained(row: dict[str, Any], limits: dict[str, float]) -> dict[str, Any]:
    """Return the least time for a row's bytes and FLOPs, which of them it is for, and how near the row comes.

    Args:
        limits: what `machine_limits` measured.
    """
    seconds = {name: row[name] / limits[f"{name}_per_second"] for name in ("bytes", "flops")}
    by = max(seconds, key=lambda name: seconds[name])
    least = 1e3 * seconds[by]
    return {"fraction_of_bound": least / row["milliseconds"], "bound": by, "bound_milliseconds": least}
