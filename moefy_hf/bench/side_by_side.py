"""What a user would pick instead: whole models in several engines, dense and MoEfied, in turns in one process."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from tqdm.auto import tqdm

from ..errors import MoefyError
from ..evaluation.quality_check import share_of
from ..loading import MoefiedModel
from ..modeling.section import Section
from .engines import ENGINES, PYTORCH
from .engines.base import LANGUAGE_MODEL, Engine, Running, Subject, kind_of
from .models import check, check_length, checkpoint_models, variants
from .settings import Settings
from .tasks import TASKS, Reading, Task, Timed, load_processor
from .tasks.base import TRIED
from .timing import against, hardware, quartiles, threads_set

DENSE, MOEFIED = "dense", "MoEfied"


@dataclass(frozen=True)
class SideBySide:
    """What is compared.

    Args:
        checkpoint: a MoEfied one, at its own budget unless `share` says another.
        engines: of `ENGINES`.
        reading: the texts or images, and how they are read.
        gguf: the dense model's file for llama.cpp.
        share: of the experts that are computed, in every layer alike.
        threads: of the CPU.

    Raises:
        MoefyError: an unknown engine, one that is not installed, a file that none reads, or a number out of range.

    Example:
        >>> given = SideBySide("my-moe", ("onnxruntime",), Reading(TextSource("test.csv")))
    """

    checkpoint: str
    engines: tuple[str, ...]
    reading: Reading
    gguf: str | None = None
    share: float | None = None
    threads: int = 1

    def __post_init__(self) -> None:
        for name in self.engines:
            if name not in ENGINES:
                raise MoefyError(f"unknown engine {name!r}; choose from {', '.join(ENGINES)}")
            ENGINES[name].check_installed()
        if self.gguf is not None and not any(ENGINES[name].reads_gguf for name in self.engines):
            readers = ", ".join(name for name, engine in ENGINES.items() if engine.reads_gguf)
            raise MoefyError(f"a dense GGUF file (--dense) is for {readers}")
        numbers = {
            name: min(given, default=0) if isinstance(given, tuple) else given
            for name, given in self.reading.said.items()
        }
        for name, value in numbers.items():
            if value < 1:
                raise MoefyError(f"{name} must be positive, got {value}")
        _ = self.settings  # which checks the others

    @property
    def settings(self) -> Settings:
        """Return what whole models are told."""
        return Settings(
            checkpoint=self.checkpoint,
            share=self.share,
            threads=self.threads,
            rounds=self.reading.rounds,
            seconds=self.reading.seconds,
            implementations=("auto",),
        )


def bench_against(given: SideBySide, *, progress: bool = True) -> dict[str, Any]:
    """Time a checkpoint's dense and MoEfied model in PyTorch and in other engines, on texts or images.

    Args:
        given: what is compared.
        progress: whether bars are shown.

    Returns:
        `settings`, `hardware`, `versions` of the engines, and `rows`: `ratio`, how many times as fast as the dense
            model in PyTorch, with its `spread`; `ratio_in_engine`, the same to the dense model in the row's engine;
            `milliseconds` and `tokens_per_second`, or `images_per_second`; and `quality`, which `settings` names.

    Raises:
        MoefyError: the checkpoint is not MoEfied, an engine cannot run it, or the data or an option do not suit it.

    Example:
        >>> figures = bench_against(SideBySide("my-moe", ("onnxruntime",), Reading(TextSource("test.csv"))))
        >>> print(table(figures))
    """
    engines = [PYTORCH, *(ENGINES[name] for name in given.engines)]
    with torch.no_grad(), threads_set(given.threads), TemporaryDirectory() as folder:
        dense, model = checkpoint_models(given.settings)
        for engine in engines:
            engine.check(model, given.gguf)
        task = TASKS[kind_of(dense)](given.reading, dense, load_processor(dense, given.checkpoint), progress)
        subject = subject_of(given, task, model, Path(folder))
        task.quality({DENSE: PYTORCH.dense(subject)}, most=1)  # whether there is something to measure
        running, places = run_in(engines, subject, progress)
        with torch.inference_mode():
            measure, quality = task.quality(running)
            timed = task.times(running)
    settings = task.to_dict() | {"checkpoint": given.checkpoint, "threads": given.threads, "gguf": given.gguf}
    settings |= {"kind": subject.kind, "experts": share_of(model), "selection": Section(model.config).selection}
    return {
        "settings": settings | {"quality": measure},
        "hardware": hardware(),
        "versions": {engine.name: engine.version() for engine in engines},
        "rows": [row for each in timed for row in rows_of(each, places, quality)],
    }


def subject_of(given: SideBySide, task: Task, model: MoefiedModel, folder: Path) -> Subject:
    """Return the model for the engines, after its sparse implementation was compared with the masked one.

    Raises:
        MoefyError: the model has too few positions for what is generated.
    """
    dense, batches, options = task.model, task.batches[:TRIED], task.options
    if kind_of(dense) == LANGUAGE_MODEL:
        check_length(dense, options["prompt"], options["new_tokens"])
    (auto,) = variants(model, ("auto",)).values()
    probed = {name: value for name, value in batches[0].items() if not name.startswith("decoder_")}
    check({DENSE: dense, "auto": auto}, model, probed)
    tokens = max(options.get("max_length", 0), options.get("prompt", 0) + options.get("new_tokens", 0))
    return Subject(dense, model, auto, batches, folder, tokens, given.threads, given.gguf)


def run_in(
    engines: Sequence[Engine], subject: Subject, progress: bool
) -> tuple[dict[str, Running], dict[str, tuple[str, str]]]:
    """Make the models in all engines.

    Returns:
        name -> model; and name -> (engine, `DENSE` or `MOEFIED`). The first is the dense model in PyTorch.
    """
    running: dict[str, Running] = {}
    places: dict[str, tuple[str, str]] = {}
    for engine in tqdm(engines, desc="engines", unit="engine", disable=not progress, leave=False):
        for which, make in ((DENSE, engine.dense), (MOEFIED, engine.moefied)):
            name = f"{engine.name}, {which}"
            running[name], places[name] = make(subject), (engine.name, which)
    return running, places


def rows_of(timed: Timed, places: Mapping[str, tuple[str, str]], quality: Mapping[str, float]) -> list[dict[str, Any]]:
    """Return a row per model.

    Args:
        timed: the seconds of each.
        places: their engines, and whether they are dense.
        quality: of each.
    """
    rows, taken = [], timed.taken
    reference = taken[next(iter(taken))]
    for name, seconds in taken.items():
        low, middle, high = quartiles(seconds)
        engine, which = places[name]
        rows.append(
            {
                "work": timed.work,
                "batch": timed.batch,
                "engine": engine,
                "model": which,
                **against(reference, seconds),
                "ratio_in_engine": against(taken[f"{engine}, {DENSE}"], seconds)["ratio"],
                "milliseconds": 1e3 * middle,
                "milliseconds_spread": [1e3 * low, 1e3 * high],
                timed.unit: timed.amount,
                f"{timed.unit}_per_second": timed.amount / middle,
                "quality": quality[name],
                "rounds": len(seconds),
            }
        )
    return rows
