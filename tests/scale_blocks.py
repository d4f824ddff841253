"""Blocks of docs/scale.md: what a checkpoint larger than memory took, and what larger ones take on paper."""

from pathlib import Path
from typing import Any

from documents import read, table

LARGE = Path(__file__).parent.parent / "model_cards" / "speed"
WORK = {
    "large_convert": "convert 4 of the layers",
    "large_convert_resumed": "convert all 32, from where it was interrupted, amid the checks",
    "large_dense": "export all 32 to dense",
}
MEASURED = 4  # layers, of the first of these
SHAPES = {  # of Llama 3: layers, d, f, width of keys and values, vocabulary
    "8B": (32, 4096, 14336, 1024, 128256),
    "70B": (80, 8192, 28672, 1024, 128256),
    "405B": (126, 16384, 53248, 1024, 128256),
}
GB = 1e9
OTHERS = 1.0  # GB: Python, and a shard that is written


def measured() -> str:
    """A line per command that was measured."""
    rows = []
    for name, title in WORK.items():
        found = read(LARGE / f"{name}.json")
        steps = ", ".join(f"{step} {seconds / 60:.1f} min" for step, seconds in found["steps"].items())
        rows.append(
            {
                "work": title,
                "most memory": f"{found['peak_gb']:.1f} GB",
                "time": f"{found['seconds'] / 60:.0f} min",
                "of that": steps,
            }
        )
    return f"{table(rows)}\n\nOn {found['hardware']}."


def weights_of(shape: tuple[int, ...]) -> tuple[float, float]:
    """Return the weights of a whole model, and those of its layers."""
    layers, d, f, kv, vocabulary = shape
    in_layers = layers * (3.0 * d * f + 2 * d * d + 2 * d * kv)
    return in_layers + 2 * vocabulary * d, in_layers


def on_paper() -> str:
    """Each size by the constants of the one that was measured."""
    found = read(LARGE / "large_convert.json")
    base = (MEASURED, *SHAPES["8B"][1:])
    rate: dict[str, Any] = {
        "profile": found["steps"]["profile"] / weights_of(base)[1],
        "split": found["steps"]["split"] / (base[0] * base[2] ** 2 * base[1]),
    }
    rest = found["seconds"] - found["steps"]["profile"] - found["steps"]["split"]
    rows = []
    for name, shape in SHAPES.items():
        whole, in_layers = weights_of(shape)
        layers, d, f, _, vocabulary = shape
        hours = {
            "profile": rate["profile"] * in_layers / 3600,
            "split": rate["split"] * layers * f**2 * d / 3600,
            "rest": rest * whole / weights_of(base)[0] / 3600,
        }
        peak = max(3 * d * f * 4 + 2 * f**2 * 4, vocabulary * d * 6) / GB + OTHERS
        rows.append(
            {
                "Llama 3": name,
                "weights": f"{2 * whole / GB:.0f} GB",
                "memory": f"{peak:.0f} GB",
                **{step: f"{value:.1f} h" for step, value in hours.items()},
                "all": f"{sum(hours.values()):.1f} h",
                "training": f"{12 * whole / GB:,.0f} GB",
            }
        )
    return table(rows)


BLOCKS = {"scale_measured": measured, "scale_on_paper": on_paper}
