"""A quick timing of ONNX graphs against those of the dense model, in turns: it says where routing does not pay."""

import statistics
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from ..loading import MoefiedModel
from ..measure.contexts import all_experts
from ..measure.made_up_inputs import Batch, made_up_batch
from .onnx_graphs import session_of, write_part
from .onnx_parts import made_up_batches, parts_of

ROWS = (1, 8)
TOKENS = 32  # of a text
SECONDS = 3.0  # of measuring, in all
ROUNDS = 5  # at least
SKIPPED = "decoder_model.onnx"  # an encoder-decoder's first step, one of many
WORDS = {"texts": "text", "images": "image", "prompt": "prompt", "step": "new token"}  # kinds that are timed


def times_of(model: MoefiedModel, folder: Path, int8: bool, progress: bool = True) -> dict[str, dict[str, float]]:
    """Time the graphs in a folder against those of the dense model, which is the model with all its experts.

    Args:
        model: running masked, in evaluation mode.
        folder: with its graphs.
        int8: whether their matrices are 8-bit; so are the dense model's then.
        progress: whether a bar is shown.

    Returns:
        kind of input (see `Example`) -> rows -> how many times as fast as dense, by medians; texts have 32 tokens, and
            a step has one token after a past.
    """
    with all_experts(model), tempfile.TemporaryDirectory(dir=folder) as dense:
        limit = getattr(model.config, "max_position_embeddings", None) or 2 * TOKENS
        shapes = [(rows, min(TOKENS, limit // 2)) for rows in ROWS]
        parts = [
            part
            for part in parts_of(model, [made_up_batch(model), *made_up_batches(model, shapes)])
            if part.file != SKIPPED
        ]
        cases = []
        for part in tqdm(parts, desc="dense ONNX, to compare times", unit="file", disable=not progress):
            write_part(model, part, Path(dense), int8)
            sessions = [session_of(Path(where) / part.file) for where in (dense, folder)]
            for example in part.compared:
                rows = len(next(iter(example.inputs.values())))
                if example.kind in WORDS and rows in ROWS:
                    cases.append((example.kind, rows, sessions, example.inputs))
        found: dict[str, dict[str, float]] = {}
        for kind, rows, sessions, inputs in cases:
            found.setdefault(kind, {})[str(rows)] = ratio_of(sessions, inputs, SECONDS / len(cases))
    return found


def ratio_of(sessions: list[Any], inputs: Batch, seconds: float) -> float:
    """Return the median time of the first session over that of the second; they run in turns."""
    fed = {name: value.numpy() for name, value in inputs.items()}
    times: list[list[float]] = [[] for _ in sessions]
    for session in sessions:
        session.run(None, fed)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[-1]) < ROUNDS:
        for session, taken in zip(sessions, times, strict=True):
            start = time.perf_counter()
            session.run(None, fed)
            taken.append(time.perf_counter() - start)
    dense, routed = (statistics.median(taken) for taken in times)
    return dense / routed


def times_line(times: Mapping[str, Mapping[str, float]]) -> str:
    """Return one line of how fast graphs are, times dense ones, which says where they are slower."""
    named = {
        f"one {WORDS[kind]}" if rows == "1" else f"{rows} {WORDS[kind]}s": ratio
        for kind, by_rows in times.items()
        for rows, ratio in by_rows.items()
    }
    slower = [name for name, ratio in named.items() if ratio < 1]
    line = "times as fast as dense: " + ", ".join(f"{name} {ratio:.2f}" for name, ratio in named.items())
    return f"{line}; slower than dense at {' and '.join(slower)}" if slower else line
