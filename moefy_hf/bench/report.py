"""The results of a benchmark as a table, and as a csv file."""

from collections.abc import Callable
from typing import Any

from ..io import write_csv


def table(figures: dict[str, Any]) -> str:
    """Return a Markdown table; what whole models have no figures for is left out.

    Args:
        figures: what `bench_ffns` or `bench_model` returned.
    """
    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "tokens": lambda row: str(row["tokens"]),
        "implementation": lambda row: row["implementation"],
        "times dense": lambda row: f"{row['ratio']:.2f}",
        "middle half": lambda row: "{:.2f} to {:.2f}".format(*row["spread"]),
        "times best dense": lambda row: f"{row['ratio_best_dense']:.2f} ({row['best_dense']})",
        "of the bound": lambda row: f"{row['fraction_of_bound']:.0%} ({row['bound']})",
        "ms": lambda row: f"{row['milliseconds']:.3g}",
        "rounds": lambda row: str(row["rounds"]),
    }
    rows = figures["rows"]
    if "bound" not in rows[0]:
        del columns["times best dense"], columns["of the bound"]
    return "\n".join([described(figures), "", *lines_of(columns, rows)])


def side_by_side_table(figures: dict[str, Any]) -> str:
    """Return a Markdown table of what `bench_against` returned."""
    measure = figures["settings"]["quality"]
    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "work": lambda row: f"{row['work']}, {row['batch']} text{'s' if row['batch'] > 1 else ''}",
        "engine": lambda row: row["engine"],
        "model": lambda row: row["model"],
        "times dense": lambda row: f"{row['ratio']:.2f}",
        "middle half": lambda row: "{:.2f} to {:.2f}".format(*row["spread"]),
        "times the engine's dense": lambda row: f"{row['ratio_in_engine']:.2f}",
        "ms": lambda row: f"{row['milliseconds']:.3g}",
        "tokens per second": lambda row: f"{row['tokens_per_second']:.0f}",
        measure: lambda row: f"{row['quality']:.4g}",
    }
    return "\n".join([described(figures), "", *lines_of(columns, figures["rows"])])


def lines_of(columns: dict[str, Callable[[dict[str, Any]], str]], rows: list[dict[str, Any]]) -> list[str]:
    """Return the lines of a Markdown table."""
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    return lines + [f"| {' | '.join(cell(row) for cell in columns.values())} |" for row in rows]


def described(figures: dict[str, Any]) -> str:
    """Return the hardware and the settings of figures, in a line."""
    settings = ", ".join(f"{name} {value}" for name, value in figures["settings"].items() if value is not None)
    return f"{figures['hardware']}; {settings}"


def save_csv(figures: dict[str, Any], path: str) -> None:
    """Write a csv file with a line per row, and pairs as two columns."""
    flat = []
    for row in figures["rows"]:
        pairs = {name: value for name, value in row.items() if isinstance(value, list)}
        single = {name: value for name, value in row.items() if name not in pairs}
        ends = {
            f"{name}_{end}": value
            for name, pair in pairs.items()
            for end, value in zip(("low", "high"), pair, strict=True)
        }
        flat.append(single | ends)
    write_csv(path, list(flat[0]), [list(row.values()) for row in flat])
