"""The results of a benchmark as a table, and as a csv file."""

from collections.abc import Callable, Iterable
from typing import Any

from ..io import markdown, write_csv

CELLS: dict[str, Callable[[dict[str, Any]], str]] = {  # column -> what it shows of a row
    "tokens": lambda row: str(row["tokens"]),
    "implementation": lambda row: row["implementation"],
    "work": lambda row: f"{row['work']}, {counted(row)}",
    "engine": lambda row: row["engine"],
    "model": lambda row: row["model"],
    "times dense": lambda row: f"{row['ratio']:.2f}",
    "middle half": lambda row: "{:.2f} to {:.2f}".format(*row["spread"]),
    "times the engine's dense": lambda row: f"{row['ratio_in_engine']:.2f}",
    "times best dense": lambda row: f"{row['ratio_best_dense']:.2f} ({row['best_dense']})",
    "of the bound": lambda row: f"{row['fraction_of_bound']:.0%} ({row['bound']})",
    "ms": lambda row: f"{row['milliseconds']:.3g}",
    "per second": lambda row: f"{row[f'{unit_of(row)}_per_second']:.0f}",
    "quality": lambda row: f"{row['quality']:.4g}",
    "rounds": lambda row: str(row["rounds"]),
}
OF_FFNS = ("times best dense", "of the bound")  # which whole models have no figures for
ALONE = ("tokens", "implementation", "times dense", "middle half", *OF_FFNS, "ms", "rounds")
SPEEDS = ("times dense", "middle half", "times the engine's dense", "ms", "per second")
AGAINST = ("work", "engine", "model", *SPEEDS, "quality")


def table(figures: dict[str, Any]) -> str:
    """Return a Markdown table of what `bench_ffns`, `bench_model` or `bench_against` returned."""
    row = figures["rows"][0]
    if "engine" in row:
        return shown(figures, AGAINST)
    return shown(figures, ALONE if "bound" in row else (name for name in ALONE if name not in OF_FFNS))


def shown(figures: dict[str, Any], columns: Iterable[str]) -> str:
    """Return what was measured where, and some columns; a quality has the name of its measure."""
    titles = {"per second": f"{unit_of(figures['rows'][0])} per second", "quality": figures["settings"].get("quality")}
    names = {name: titles.get(name, name) for name in columns}
    rows = [{title: CELLS[name](row) for name, title in names.items()} for row in figures["rows"]]
    return f"{described(figures)}\n\n{markdown(rows)}"


def unit_of(row: dict[str, Any]) -> str:
    """Return what a speed is given in."""
    return "images" if "images" in row else "tokens"


def counted(row: dict[str, Any]) -> str:
    """Return how many texts or images are run at once."""
    name = "image" if unit_of(row) == "images" else "text"
    return f"{row['batch']} {name}{'s' if row['batch'] > 1 else ''}"


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
