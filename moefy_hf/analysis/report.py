"""The report: one HTML file that needs nothing else, and the numbers as CSV and JSON beside it."""

import csv
import io
import json
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader

from ..io import write_whole
from .analyze import Analysis

TEMPLATE = "report.html.jinja"


def write_report(
    folder: str | Path,
    analysis: Analysis,
    *,
    sweep: dict[str, Any] | None = None,
    partitions: list[dict[str, Any]] | None = None,
    removal: dict[str, Any] | None = None,
) -> Path:
    """Write `report.html`, `analysis.json` and a CSV file per table into a folder.

    Args:
        sweep: quality against compute, as in a checkpoint's facts.
        partitions: what `compare_partitions` found.
        removal: `{"title": ..., "rows": ...}`, what `remove_together` found.

    Returns:
        the path of the page.

    Raises:
        ImportError: plotly, which draws the figures in the browser, is not installed.
    """
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise ImportError("the report needs plotly: pip install 'moefy-hf[report]'") from error
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tables = tables_of(analysis, sweep, partitions, removal)
    files = {name: as_csv(rows) for name, rows in tables.items()}
    data = analysis.to_dict() | {"sweep": sweep, "removal": removal, "files": files}
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True)
    page = environment.get_template(TEMPLATE).render(
        facts=analysis.facts,
        specialisation=analysis.specialisation,
        layers=tables["layers"],
        partitions=partitions,
        sweep=sweep,
        removal=removal,
        data=embedded(data),
        plotly=get_plotlyjs(),
    )
    for name, text in files.items():
        write_whole(folder / f"{name}.csv", text)
    analysis.save(folder / "analysis.json")
    write_whole(folder / "report.html", page)
    return folder / "report.html"


def embedded(data: Any) -> str:
    """Return JSON that can stand in a script element: no text of a user's ends that element."""
    return json.dumps(data, ensure_ascii=True).replace("<", "\\u003c")


def tables_of(
    analysis: Analysis,
    sweep: dict[str, Any] | None,
    partitions: list[dict[str, Any]] | None,
    removal: dict[str, Any] | None,
) -> dict[str, list[dict[str, Any]]]:
    """Return the rows of each table, which have equal keys, by its name."""
    layers, experts, findings = [], [], []
    for number, layer in enumerate(analysis.layers):
        layers.append({"layer": number} | {key: value for key, value in layer.items() if not isinstance(value, list)})
        for position, expert in enumerate(layer["experts"]):
            plain = {key: value for key, value in expert.items() if not isinstance(value, list)}
            if "variance_explained" in layer:
                plain["variance_explained"] = layer["variance_explained"][position]
            experts.append({"layer": number} | plain)
            for kind in ("class", "token", "kind"):
                findings += [
                    {"layer": number, "expert": expert["expert"], "responds to": kind} | finding
                    for finding in expert.get(kind, [])
                ]
    tables = {"specialisation": analysis.specialisation, "layers": layers, "experts": experts, "findings": findings}
    if sweep is not None:
        columns = ("router", "type", "allocation", "experts", "ffn_flops", sweep["facts"]["quality"])
        tables["sweep"] = [{name: row.get(name) for name in columns} for row in sweep["rows"]]
    if partitions:
        tables["partitions"] = partitions
    if removal:
        tables["removal"] = removal["rows"]
    return tables


def as_csv(rows: list[dict[str, Any]]) -> str:
    """Return rows of equal keys as csv, with a line of titles."""
    text = io.StringIO()
    if rows:
        writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return text.getvalue()
