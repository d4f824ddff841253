"""The notebooks run from top to bottom, without a hub, and end in what they promise."""

import json
from pathlib import Path

import pytest

plt = pytest.importorskip("matplotlib.pyplot")
NOTEBOOKS = Path(__file__).parent.parent / "docs" / "notebooks"


def run(name: str) -> dict:
    """Execute the code of a notebook, cell by cell, and return its variables."""
    cells = json.loads((NOTEBOOKS / name).read_text(encoding="utf-8"))["cells"]
    names: dict = {"__name__": "__main__"}
    for number, cell in enumerate(cells):
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"{name}, cell {number}", "exec"), names)  # noqa: S102
    return names


def test_the_quickstart(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plt.switch_backend("agg")
    names = run("quickstart.ipynb")
    rows = names["sweep"].rows
    dense = rows[0]["perplexity"]
    at = {(row["router"], row["experts"]): row["perplexity"] for row in rows[1:]}
    own, random = (
        sorted((share, p) for (router, share), p in at.items() if router == name) for name in ("own", "random")
    )
    assert len(own) == len(random) == 4 and dense < 5  # each word has three followers
    assert own[-1][1] < 1.05 * dense  # most experts: hardly worse than dense
    assert all(a < b for (_, a), (_, b) in zip(own, random, strict=True))  # the router is worth having
    (axes,) = plt.gcf().axes
    assert len(axes.lines) == 4 and axes.get_ylabel() == "perplexity"
    assert type(names["moe"]).__name__ == "MoefiedOPTForCausalLM" and type(names["dense"]).__name__ == "OPTForCausalLM"
    plt.close("all")


@pytest.mark.parametrize("path", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda path: path.stem)
def test_notebooks_are_committed_without_outputs(path):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    assert all(
        not cell["outputs"] and cell["execution_count"] is None for cell in cells if cell["cell_type"] == "code"
    )
