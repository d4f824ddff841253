"""How long one batch takes: dense, MoEfied with masks, and MoEfied as fast as it runs here."""

import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..bench.timing import hardware
from .arguments import TimingArguments
from .stages import write_json
from .steps import budgets

if TYPE_CHECKING:
    from .run import Run

IMPLEMENTATIONS = ("auto", "masked")


def measure_times(run: "Run", path: Path) -> None:
    """Write the median milliseconds of a batch, dense and at every budget, measured in turn on the same batches.

    The file has "milliseconds": {"dense": {"dense": ...}, "moefied at 0.2": {"auto": ..., "masked": ...}}, and what
    they were measured on.
    """
    dense = run.load("dense").eval()
    model = run.load("moefied").eval()
    batches = [
        {name: tensor.to(model.device) for name, tensor in batch.items()}
        for batch in islice(run.held_out(), run.arguments[TimingArguments].timed_batches)
    ]
    taken: dict[tuple[str, str], list[float]] = {}
    with torch.no_grad(), run.autocast():
        for batch in tqdm(batches, desc="time a batch", unit="batch"):
            taken.setdefault(("dense", "dense"), []).append(milliseconds(dense, batch))
            for budget in budgets(run, model):
                for name in IMPLEMENTATIONS:
                    model.set_moe_implementation(name)
                    taken.setdefault((f"moefied{budget}", name), []).append(milliseconds(model, batch))
    found: dict[str, dict[str, float]] = {}
    for (who, implementation), times in taken.items():
        found.setdefault(who, {})[implementation] = median(times)
    write_json(path, {"milliseconds": found, **conditions(batches, model)})


def milliseconds(model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> float:
    """Return the time of a forward pass, after one that is not timed."""
    model(**batch)
    wait: Callable = torch.accelerator.synchronize if model.device.type != "cpu" else lambda: None
    wait()
    started = time.perf_counter()
    model(**batch)
    wait()
    return 1000 * (time.perf_counter() - started)


def conditions(batches: list[dict[str, torch.Tensor]], model: PreTrainedModel) -> dict[str, Any]:
    """Return what times were measured on."""
    rows = median(next(iter(batch.values())).shape[0] for batch in batches)
    device = f"{hardware()}, {torch.get_num_threads()} threads"
    if model.device.type == "cuda":
        device = torch.cuda.get_device_name(model.device)
    return {"batches": len(batches), "rows": rows, "device": device}
