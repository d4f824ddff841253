"""Figures, drawn with matplotlib (the `plots` extra)."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..modeling.selection_config import setting_name
from .controls import BASELINES, CONTROLS

if TYPE_CHECKING:
    from .sweep import Sweep

OWN = "#1f6feb"  # the model's own routers
COLORS = {"own": OWN, **{name: control.color for name, control in CONTROLS.items()}, **BASELINES}
DYNAMIC = {"threshold": "^", "top_p": "v", "level": "D"}  # selections of as many experts as a token needs
STYLES = {"sensitivity": ("-", "o"), "angular": ("-.", "P")}  # of budgets that differ between layers
VIEWS = (OWN, "#2da44e", "#8c959f")  # routed, split, random


def plot_sweep(sweep: "Sweep", path: str | Path) -> None:
    """Draw quality against the share of dense FFN FLOPs.

    There is a line per router, selection and allocation, and a dotted one for the dense model.

    Args:
        path: of the picture; its suffix is the format.

    Raises:
        ImportError: matplotlib is not installed.
    """
    quality = sweep.facts["quality"]
    figure, axes = new_figure()
    dense, *rows = sweep.rows
    axes.axhline(dense[quality], color="#57606a", linestyle=":", label=f"dense: {dense[quality]:.4g}")
    lines: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in rows:
        lines.setdefault((row["router"], row.get("type", "top_k"), allocation_words(row)), []).append(row)
    for (router, kind, words), line in lines.items():
        line.sort(key=lambda row: row["ffn_flops"])
        name = sweep.facts.get("router", "router") if router == "own" else router
        name += " (control)" if router in CONTROLS else ""
        name += f", {kind}" if kind in DYNAMIC else ""
        style, marker = STYLES.get(words.removesuffix(" budgets"), ("--", "s"))
        axes.plot(
            [row["ffn_flops"] for row in line],
            [row[quality] for row in line],
            style,
            marker=DYNAMIC.get(kind, marker),
            color=COLORS[router],
            markersize=4,
            label=f"{name}, {words}",
        )
    if quality == "perplexity":
        axes.set_yscale("log")
    axes.set_xlabel("FFN FLOPs relative to dense, router included")
    axes.set_ylabel(quality)
    axes.xaxis.set_major_formatter("{x:.0%}")
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=160)


def allocation_words(row: dict[str, Any]) -> str:
    """Return in words what decides how much each layer computes in a row of a sweep: budgets, or a threshold."""
    if "allocation" in row:
        return f"{row['allocation']} budgets"
    name = str(setting_name(row["type"]))
    value = row[name]
    values = ", ".join(f"{number:.3g}" for number in (value if isinstance(value, list) else [value]))
    return f"{name} {values}"


def plot_bench(figures: dict[str, Any], path: str | Path) -> None:
    """Draw the speed-up over dense against tokens per call: a line per implementation, a band over its middle half.

    Args:
        figures: what `bench_ffns` returned.

    Raises:
        ImportError: matplotlib is not installed.
    """
    figure, axes = new_figure()
    axes.axhline(1, color="#57606a", linestyle=":", label="dense")
    rows = [row for row in figures["rows"] if row["implementation"] != "dense"]
    for name in dict.fromkeys(row["implementation"] for row in rows):
        line = sorted((row for row in rows if row["implementation"] == name), key=lambda row: row["tokens"])
        tokens = [row["tokens"] for row in line]
        (drawn,) = axes.plot(tokens, [row["ratio"] for row in line], "-o", markersize=4, label=name)
        spreads = zip(*(row["spread"] for row in line), strict=True)
        axes.fill_between(tokens, *spreads, color=drawn.get_color(), alpha=0.15, linewidth=0)
    settings = figures["settings"]
    threads = "1 thread" if settings["threads"] == 1 else f"{settings['threads']} threads"
    axes.set_title(f"{settings['preset'] or settings['checkpoint']}, {settings['dtype']}, {threads}", fontsize=10)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("tokens per call")
    axes.set_ylabel("times as fast as dense")
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=160)


def plot_experts(analysis: dict[str, Any], path: str | Path) -> None:
    """Draw how specialised experts are, beside a random split of the same neurons; and which experts of one layer
    respond to which class.

    Args:
        analysis: of a checkpoint's facts, what `Analysis.summary` returned.

    Raises:
        ImportError: matplotlib is not installed.
    """
    rows, strongest = analysis["specialisation"], analysis.get("strongest")
    columns = [name for name in rows[0] if name.startswith(("experts with", "variance"))]
    figure, panels = new_figure(11, 2) if strongest is not None else new_figure()
    panels = panels if strongest is not None else [panels]
    for number, row in enumerate(rows):
        places = [place + 0.27 * (number - 1) for place in range(len(columns))]
        panels[0].barh(places, [row[name] for name in columns], 0.25, label=row["experts by"], color=VIEWS[number])
    panels[0].set_yticks(range(len(columns)), [name.replace(" that ", "\nthat ") for name in columns])
    panels[0].invert_yaxis()
    panels[0].legend(title="experts by", fontsize=8)
    panels[0].xaxis.set_major_formatter("{x:.0%}")
    panels[0].grid(alpha=0.25, axis="x")
    if strongest is not None:
        image = panels[1].imshow(strongest["times"], aspect="auto", cmap="viridis", vmin=1)
        panels[1].set_yticks(range(len(strongest["classes"])), strongest["classes"], fontsize=7)
        panels[1].set_xlabel(f"experts of layer {strongest['layer']}, sorted")
        figure.colorbar(image, label="times as often as in all texts; 1 where it could be chance")
    figure.savefig(path, dpi=110)


def new_figure(width: float = 6.4, panels: int = 1) -> tuple[Any, Any]:
    """Return a figure, and its axes: one, or a sequence of several side by side.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'moefy-hf[plots]'") from error
    figure = Figure(figsize=(width, 4.2), layout="constrained")
    return figure, figure.subplots(1, panels)
