"""Figures, drawn with matplotlib (the `plots` extra)."""

from pathlib import Path
from typing import TYPE_CHECKING

from .controls import CONTROLS

if TYPE_CHECKING:
    from .evaluation import Sweep

COLOURS = {"own": "#1f6feb", "oracle": "#2da44e", "oracle_mass": "#8250df", "random": "#bf3989"}
COLOURS |= {"cats": "#9a6700", "teal": "#1b7c83", "wina": "#bc4c00"}


def plot_sweep(sweep: "Sweep", path: str | Path) -> None:
    """Quality against the share of dense FFN FLOPs: a line per router and allocation, the dense model as a rule."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'moefy-hf[plots]'") from error
    quality = sweep.facts["quality"]
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    dense, *rows = sweep.rows
    axes.axhline(dense[quality], color="#57606a", linestyle=":", label=f"dense: {dense[quality]:.4g}")
    for router, allocation in dict.fromkeys((row["router"], row["allocation"]) for row in rows):
        line = [row for row in rows if (row["router"], row["allocation"]) == (router, allocation)]
        line.sort(key=lambda row: row["ffn_flops"])
        name = sweep.facts.get("router", "router") if router == "own" else router
        name += " (control)" if router in CONTROLS else ""
        style = "-o" if allocation == "sensitivity" else "--s"
        axes.plot(
            [row["ffn_flops"] for row in line],
            [row[quality] for row in line],
            style,
            color=COLOURS[router],
            markersize=4,
            label=f"{name}, {allocation} budgets",
        )
    if quality == "perplexity":
        axes.set_yscale("log")
    axes.set_xlabel("FFN FLOPs relative to dense, router included")
    axes.set_ylabel(quality)
    axes.xaxis.set_major_formatter("{x:.0%}")
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=160)
