"""The figures of the README and of the cards are those of the committed facts."""

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "recipes"))
import sweep_tables  # noqa: E402

FACTS = sorted((ROOT / "model_cards" / "facts").glob("*.json"))


@pytest.fixture(scope="module")
def results():
    text = (ROOT / "README.md").read_text()
    return text[text.index("<!-- results -->") : text.index("<!-- /results -->")]


@pytest.mark.parametrize("path", FACTS, ids=lambda path: path.stem)
def test_the_readme_shows_the_facts(path, results):
    facts = json.loads(path.read_text())
    assert sweep_tables.tables(facts, ["relative_quality"]) in results
    assert facts["command"] in results


@pytest.mark.parametrize("path", FACTS, ids=lambda path: path.stem)
def test_the_card_shows_all_figures(path):
    """python recipes/sweep_tables.py model_cards/facts/NAME.json > model_cards/NAME.md"""
    card = (ROOT / "model_cards" / f"{path.stem}.md").read_text()
    assert card == sweep_tables.tables(json.loads(path.read_text())) + "\n"


def test_there_are_facts():
    assert FACTS
