"""The README's figures are those of the committed facts."""

import importlib.util
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FACTS = sorted((ROOT / "model_cards" / "facts").glob("*.json"))


@pytest.fixture(scope="module")
def results():
    text = (ROOT / "README.md").read_text()
    return text[text.index("<!-- results -->") : text.index("<!-- /results -->")]


@pytest.mark.parametrize("path", FACTS, ids=lambda path: path.stem)
def test_readme_shows_the_facts(path, results, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "recipes"))
    spec = importlib.util.spec_from_file_location("sweep", ROOT / "recipes" / "sweep.py")
    sweep = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sweep)
    facts = json.loads(path.read_text())
    assert sweep.tables(facts) in results
    assert facts["command"] in results


def test_there_are_facts():
    assert FACTS
