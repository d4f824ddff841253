"""Timings in turns, what this machine can do at best, and its name."""

import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

LEAST = 5  # rounds, however long they take

Call = Callable[[], Any]


def take_turns(
    prepare: Callable[[int], Mapping[str, Call]], rounds: int, seconds: float, title: str, progress: bool
) -> dict[str, list[float]]:
    """Time every method in each round, their order drawn anew.

    Args:
        prepare: a round's number -> what each method calls in it; not timed.
        rounds, seconds: as in `Settings`.

    Returns:
        seconds of each method, one number per round.
    """
    taken: dict[str, list[float]] = {}
    draw, began = random.Random(0), time.perf_counter()
    with tqdm(total=rounds, desc=title, unit="round", disable=not progress, leave=False) as bar:
        for turn in range(rounds):
            if turn >= LEAST and time.perf_counter() - began > seconds:
                break
            calls = prepare(turn)
            taken = taken or {name: [] for name in calls}
            for name in draw.sample(list(calls), len(calls)):
                taken[name].append(timed(calls[name]))
            bar.update()
    return taken


def timed(function: Callable, *arguments: Any) -> float:
    """Return the seconds of one call."""
    started = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - started


def quartiles(numbers: Sequence[float]) -> tuple[float, float, float]:
    """Return quartiles: a quarter of the numbers lies below the first, half below the second, a quarter above the
    third."""
    if len(numbers) == 1:
        return numbers[0], numbers[0], numbers[0]
    low, middle, high = statistics.quantiles(numbers, n=4, method="inclusive")
    return low, middle, high


def against(dense: Sequence[float], method: Sequence[float]) -> dict[str, Any]:
    """Return how many times as fast as dense a method is, round by round: the median `ratio`, and its `spread`, below
    and above which a quarter of the rounds lie.

    Args:
        dense, method: seconds, one per round.
    """
    low, middle, high = quartiles([a / b for a, b in zip(dense, method, strict=True)])
    return {"ratio": middle, "spread": [low, high]}


@contextmanager
def threads_set(threads: int) -> Iterator[None]:
    """Let torch use so many threads for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def machine_limits(dtype: torch.dtype) -> dict[str, float]:
    """Measure what this machine can do: the best of some tries of reading memory in one stream, and of a large matrix
    product, by torch or prepacked.

    Returns:
        `bytes_per_second` and `flops_per_second`.
    """
    memory = torch.ones(20_000, 5_000)
    square, vector = torch.randn(1024, 1024).to(dtype), torch.ones(5_000)
    read = min(min(timed(memory.sum), timed(memory.mv, vector)) for _ in range(6))
    products: list[Call] = [partial(square.mm, square)]
    if can_prepack(dtype):
        packed = torch.ops.mkldnn._reorder_linear_weight(square)
        products.append(partial(torch.ops.mkldnn._linear_pointwise, square, packed, None, "none", [], ""))
    product = min(timed(call) for _ in range(8) for call in products)
    return {"bytes_per_second": memory.nbytes / read, "flops_per_second": 2 * 1024**3 / product}


def can_prepack(dtype: torch.dtype) -> bool:
    """Return whether oneDNN takes weights of a dtype in a layout of its own here."""
    if not torch.backends.mkldnn.is_available():
        return False
    return dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported()


def hardware() -> str:
    """Return the processor's name, its vector instructions, and how many cores there are."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}, {os.cpu_count()} cores, torch {torch.__version__}"
